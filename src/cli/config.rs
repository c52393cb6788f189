//! `temper config show | diff | schema`: what a configuration resolves to and who set what, where two differ, and the JSON
//! Schema that editors complete and check with.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::{Global, common};
use crate::Result;
use crate::config::{self, explain, schema};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Every key as it resolves, as YAML; what is not a default names the file or --set that set it
    Show {
        /// A configuration, e.g. configs/e5c.yaml
        config: PathBuf,
        /// Override one key (repeatable)
        #[arg(long = "set", value_name = "KEY=VALUE")]
        overrides: Vec<String>,
    },
    /// The keys in which two configurations differ
    Diff {
        a: PathBuf,
        b: PathBuf,
        /// Override one key of B (repeatable)
        #[arg(long = "set", value_name = "KEY=VALUE")]
        overrides: Vec<String>,
    },
    /// JSON Schema of a configuration, for editors
    Schema,
}

pub fn run(args: &Args, global: &Global) -> Result<()> {
    match &args.command {
        Command::Show { config, overrides } => {
            let (config, leaves) = config::load_explained(config, overrides)?;
            if !global.json {
                return super::print(explain::to_yaml(&leaves).trim_end());
            }
            let keys: Map<String, Value> = leaves
                .into_iter()
                .map(|leaf| (leaf.key, json!({"value": leaf.value, "source": leaf.source})))
                .collect();
            super::print(json!({"config_hash": config.hash(), "keys": keys}))
        }
        Command::Diff { a, b, overrides } => {
            let (first, second) = (config::load(a, &[])?, config::load(b, overrides)?);
            let differences = explain::differences(&first, &second);
            let hashes = [first.hash(), second.hash()];
            if global.json {
                return super::print(json!({"config_hashes": hashes, "differences": differences}));
            }
            if differences.is_empty() {
                return super::print(format_args!("no difference ({})", hashes[0]));
            }
            let mut table = common::plain_table(&["key", &first.name, &second.name]);
            let shown = |value: &Option<Value>| value.as_ref().map_or("-".to_string(), Value::to_string);
            for d in &differences {
                table.add_row([d.key.clone(), shown(&d.a), shown(&d.b)]);
            }
            table.add_row(["(hash)", &hashes[0], &hashes[1]]);
            super::print(common::lines(&table))
        }
        Command::Schema => super::print(format_args!("{:#}", schema::json_schema())),
    }
}
