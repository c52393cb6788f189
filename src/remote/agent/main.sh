# The operation that was asked for.
[ "$operation" = supervise ] || printf 'temper-agent 1\n'
case $operation in
probe | receive_blob | receive_snapshot | install_runtime | try | submit | supervise | cancel | status | logs | manifest | read_files | clean) "$operation" "$@" ;;
*) fail 2 "$operation: no such operation" ;;
esac
