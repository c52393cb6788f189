//! HF's JSON files read key by key: every problem names the key, what was found and what was expected.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result, bail_input, input_error};

/// Reads and parses a JSON file; errors name the file and the place in it.
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| input_error!("{}: not valid JSON: {e}", path.display()))
}

/// A JSON object read key by key; `null` counts as absent, as in HF's files.
pub struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    pub fn new(value: &'a Value) -> Result<Keys<'a>> {
        value.as_object().map(Keys).ok_or_else(|| input_error!("found {}, expected a JSON object", kind_of(value)))
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| input_error!("{key}: missing, expected a positive integer"))
    }

    /// Sizes stay below 2^31, so that products of two of them cannot overflow.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64().filter(|v| (1..1 << 31).contains(v)) {
            Some(size) => Ok(Some(size as usize)),
            None => bail_input!("{key}: found {value}, expected a positive integer below 2^31"),
        }
    }

    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
            Some(number) => Ok(Some(number)),
            None => bail_input!("{key}: found {value}, expected a positive number"),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => bail_input!("{key}: found {value}, expected true or false"),
        }
    }

    pub fn token_id(&self, key: &str) -> Result<Option<u32>> {
        self.get(key).map(|value| token_id(key, value)).transpose()
    }

    /// One id, a list of ids, or nothing.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        match self.get(key) {
            None => Ok(vec![]),
            Some(Value::Array(list)) => list.iter().map(|value| token_id(key, value)).collect(),
            Some(value) => Ok(vec![token_id(key, value)?]),
        }
    }
}

fn token_id(key: &str, value: &Value) -> Result<u32> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| input_error!("{key}: found {value}, expected a token id"))
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
