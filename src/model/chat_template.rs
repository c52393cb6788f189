//! A model's own chat template (Jinja), rendered as transformers' `apply_chat_template` renders it.
//!
//! transformers' environment: `trim_blocks`, `lstrip_blocks`, loop controls, Python's methods on strings,
//! lists and dicts, `tojson` without HTML escapes, `raise_exception`, `strftime_now`. Undefined names print as
//! nothing.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value as JinjaValue, context};
use serde::Serialize;
use serde_json::{Map, Value};

use super::config::read_json;
use crate::{Error, Result, bail_input, input_error};

const NAME: &str = "chat_template";

type JinjaResult = std::result::Result<String, JinjaError>;

/// A compiled template with the special tokens it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
    /// The file it came from, for messages.
    origin: String,
}

/// One turn of a conversation.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Message<'a> {
    pub role: &'a str,
    pub content: &'a str,
}

impl ChatTemplate {
    /// The template of a tokenizer's directory: `chat_template.jinja`, else `chat_template` in
    /// tokenizer_config.json (a string, or a list of named templates with a `default`). `None` without one.
    pub fn from_dir(dir: &Path) -> Result<Option<ChatTemplate>> {
        let config_path = dir.join("tokenizer_config.json");
        let config = match config_path.exists() {
            true => read_json(&config_path)?,
            false => Value::Null,
        };
        let file = dir.join("chat_template.jinja");
        let (source, origin) = if file.exists() {
            (Some(std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?), file.display().to_string())
        } else {
            let origin = config_path.display().to_string();
            (source_in_config(&config).map_err(|e| e.at(&origin))?, origin)
        };
        source.map(|source| ChatTemplate::new(source, special_tokens(&config), origin)).transpose()
    }

    /// Compiles `source`; `origin` names it in errors.
    pub fn new(source: String, special_tokens: Map<String, Value>, origin: String) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| input_error!("{origin}: {}", describe(&e)))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> JinjaResult {
            Err(JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(NAME, source).map_err(|e| input_error!("{origin}: {}", describe(&e)))?;
        Ok(ChatTemplate { environment, special_tokens, origin })
    }

    /// The conversation as text; `add_generation_prompt` opens the assistant's turn.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let failed = |e: JinjaError| input_error!("{}: {}", self.origin, describe(&e));
        let template = self.environment.get_template(NAME).map_err(failed)?;
        template
            .render(context! {
                messages => Serde(messages),
                tools => (),
                documents => (),
                add_generation_prompt => add_generation_prompt,
                ..JinjaValue::from(Serde(&self.special_tokens))
            })
            .map_err(failed)
    }
}

fn source_in_config(config: &Value) -> Result<Option<String>> {
    match config.get(NAME) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|t| t.get("name").is_some_and(|n| n == "default"));
            match default.and_then(|t| t.get("template")).and_then(Value::as_str) {
                Some(source) => Ok(Some(source.to_string())),
                None => bail_input!("{NAME}: found a list without \"default\", expected a template of that name"),
            }
        }
        Some(_) => bail_input!("{NAME}: expected a string or a list of named templates"),
    }
}

/// `bos_token`, `eos_token` and so on, as strings: an entry may also be an object with `content`.
fn special_tokens(config: &Value) -> Map<String, Value> {
    let entries = config.as_object().into_iter().flatten();
    let text = |value: &Value| match value {
        Value::String(_) => Some(value.clone()),
        Value::Object(token) => token.get("content").cloned(),
        _ => None,
    };
    entries
        .filter(|(key, _)| key.ends_with("_token"))
        .filter_map(|(key, value)| Some((key.clone(), text(value)?)))
        .collect()
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: spaces after `,` and `:`, no HTML escapes.
fn to_json(value: JinjaValue, kwargs: Kwargs) -> JinjaResult {
    let indent: Option<usize> = kwargs.get("indent")?;
    let value =
        serde_json::to_value(&value).map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, e.to_string()))?;
    Ok(match indent {
        None => spaced_json(&value),
        Some(width) => indented_json(&value, width),
    })
}

fn spaced_json(value: &Value) -> String {
    let join = |parts: Vec<String>| parts.join(", ");
    match value {
        Value::Array(items) => format!("[{}]", join(items.iter().map(spaced_json).collect())),
        Value::Object(map) => {
            let entry = |(k, v): (&String, &Value)| format!("{}: {}", Value::from(k.as_str()), spaced_json(v));
            format!("{{{}}}", join(map.iter().map(entry).collect()))
        }
        scalar => scalar.to_string(),
    }
}

fn indented_json(value: &Value, width: usize) -> String {
    let indent = " ".repeat(width);
    let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    // Writing a Value into memory has nothing to fail on; an empty text would be the only trace.
    let _ = value.serialize(&mut serializer);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The date and time now (UTC) in the directives that templates use.
fn strftime_now(format: String) -> JinjaResult {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    format_time(&format, now.map_or(0, |d| d.as_secs() as i64))
        .map_err(|bad| JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: %{bad} is not known")))
}

/// `Err` carries the directive that is not known.
fn format_time(format: &str, unix_s: i64) -> std::result::Result<String, char> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    let (year, month, day) = civil_date(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[days.rem_euclid(7) as usize]);
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(c) = characters.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let directive = characters.next().unwrap_or('%');
        text += &match directive {
            'Y' => year.to_string(),
            'y' => format!("{:02}", year.rem_euclid(100)),
            'm' => format!("{month:02}"),
            'd' => format!("{day:02}"),
            'B' => month_name.to_string(),
            'b' => month_name[..3].to_string(),
            'A' => day_name.to_string(),
            'a' => day_name[..3].to_string(),
            'H' => format!("{:02}", second / 3600),
            'M' => format!("{:02}", second / 60 % 60),
            'S' => format!("{:02}", second % 60),
            '%' => "%".to_string(),
            unknown => return Err(unknown),
        };
    }
    Ok(text)
}

/// Year, month 1..12 and day 1..31 of a day counted from 1970-01-01 (proleptic Gregorian calendar).
fn civil_date(days: i64) -> (i64, usize, i64) {
    let shifted = days + 719_468; // days since 0000-03-01
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as usize, day_of_year - (153 * march_month + 2) / 5 + 1)
}

/// The template engine's message on one line.
fn describe(error: &JinjaError) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let text = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    format!("chat template: {line}{}", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn render(source: &str, content: &str) -> Result<String> {
        let template = ChatTemplate::new(source.into(), Map::new(), "t.jinja".into())?;
        template.render(&[Message { role: "user", content }], true)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\nU {{ m.content.strip() }}\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nA:\n{% endif %}\n";
        assert_eq!(render(source, " hi ").unwrap(), "U hi\nA:\n");
    }

    #[test]
    fn tojson_is_python_json_dumps() {
        assert_eq!(render("{{ messages | tojson }}", "<é'\"").unwrap(), r#"[{"role": "user", "content": "<é'\""}]"#);
    }

    #[test]
    fn a_template_that_raises_is_one_line_with_its_file() {
        let error = render("{{ raise_exception('roles must\nalternate') }}", "x").unwrap_err();
        assert_eq!(error.to_string(), "t.jinja: chat template: line 1: roles must alternate");
        let error = render("{% if %}", "x").unwrap_err().to_string();
        assert!(error.starts_with("t.jinja: chat template: line 1: ") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn dates_are_calendar_dates() {
        assert_eq!(format_time("%A %d %B %Y %H:%M:%S", 951_782_400).unwrap(), "Tuesday 29 February 2000 00:00:00");
        assert_eq!(format_time("%a %d %b %y", 0).unwrap(), "Thu 01 Jan 70");
        assert_eq!(format_time("%Q", 0), Err('Q'));
    }
}
