#!/usr/bin/env bash
# Sets up what is missing, then trains a tiny model under E5c's noise and prints its accuracy before and after.
# CPU is enough; nothing but packages from registries is downloaded. Arguments go to `temper quickstart`.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

./scripts/bootstrap.sh
exec "$TEMPER" quickstart "$@"
