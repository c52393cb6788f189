//! How long the prompts and responses of a benchmark's step are, without data: drawn from a law, fixed, or from a file.
//!
//! `gsm8k`: lognormal, rounded, clipped. Prompts have median 100, sigma 0.2, at 56 to 256: the questions of GSM8K's
//! training set with Qwen's chat template and the default suffix have median 100 and a standard deviation of the logarithm
//! of 0.20, at 56 to 256. Responses have median 135, sigma 0.45, at 16 to 1024, mean 149: its worked answers have 111
//! and 0.42, and a model writes more than they do. Together about 251 tokens on average.
//!
//! Every number is keyed by (seed, prompt, member). Lengths are cut to what the recipe and the model allow.

use std::path::PathBuf;

use crate::numerics::generator::normal;
use crate::numerics::noise_key::{Phase, Purpose, row_key, stream};
use crate::{Error, Result, bail_input};

/// Median, sigma of the logarithm, smallest and largest.
struct Lognormal(f64, f64, f64, f64);

const PROMPTS: Lognormal = Lognormal(100.0, 0.2, 56.0, 256.0);
const RESPONSES: Lognormal = Lognormal(135.0, 0.45, 16.0, 1024.0);

impl Lognormal {
    fn at(&self, z: f32) -> usize {
        let Lognormal(median, sigma, least, most) = *self;
        (median * (sigma * f64::from(z)).exp()).round().clamp(least, most) as usize
    }
}

/// Where lengths come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    Gsm8k,
    /// Prompts as `gsm8k`, every response of so many tokens.
    Fixed(usize),
    /// A line a prompt: its tokens, then those of its responses; lines and responses are taken in turn.
    File(PathBuf),
}

/// The lengths of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    pub prompts: Vec<usize>,
    /// Group members together.
    pub responses: Vec<usize>,
}

/// What a step may be at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub prompt: usize,
    pub response: usize,
    /// Of both together: the model's positions.
    pub sequence: usize,
}

impl Lengths {
    /// `gsm8k`, a number, or a file.
    ///
    /// # Errors
    /// A number below 1.
    pub fn parse(text: &str) -> Result<Lengths> {
        match text.parse::<usize>() {
            Ok(0) => bail_input!("--lengths 0: expected at least 1 token"),
            Ok(n) => Ok(Lengths::Fixed(n)),
            Err(_) if text == "gsm8k" => Ok(Lengths::Gsm8k),
            Err(_) => Ok(Lengths::File(text.into())),
        }
    }

    /// What goes into the report.
    pub fn name(&self) -> String {
        match self {
            Lengths::Gsm8k => "gsm8k".to_string(),
            Lengths::Fixed(n) => n.to_string(),
            Lengths::File(path) => path.display().to_string(),
        }
    }

    pub fn draw(&self, prompts: usize, group_size: usize, seed: u64, limits: Limits) -> Result<Drawn> {
        let listed = match self {
            Lengths::File(path) => read(path)?,
            _ => Vec::new(),
        };
        let of_prompts = stream(Purpose::Other, Phase::Rollout, 0, 2)?;
        let of_responses = stream(Purpose::Other, Phase::Rollout, 0, 3)?;
        let mut drawn = Drawn { prompts: Vec::new(), responses: Vec::new() };
        for p in 0..prompts {
            let line = listed.get(p % listed.len().max(1));
            let prompt = match line {
                Some((prompt, _)) => *prompt,
                None => PROMPTS.at(normal(seed, of_prompts, row_key(0, p as u32), 0)),
            };
            // A response has at least one token, whatever the prompt.
            let prompt = prompt.min(limits.prompt).min(limits.sequence - 1).max(1);
            drawn.prompts.push(prompt);
            for member in 0..group_size {
                let response = match (self, line) {
                    (_, Some((_, responses))) => responses[member % responses.len()],
                    (Lengths::Fixed(n), _) => *n,
                    _ => RESPONSES.at(normal(seed, of_responses, row_key(p as u32, member as u32), 0)),
                };
                drawn.responses.push(response.min(limits.response).min(limits.sequence - prompt).max(1));
            }
        }
        Ok(drawn)
    }
}

/// (prompt, responses) of every line that is not empty.
fn read(path: &PathBuf) -> Result<Vec<(usize, Vec<usize>)>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut all = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let numbers: std::result::Result<Vec<usize>, _> = line.split_whitespace().map(str::parse).collect();
        match numbers.as_deref() {
            Ok([prompt, responses @ ..]) if !responses.is_empty() && !responses.contains(&0) && *prompt > 0 => {
                all.push((*prompt, responses.to_vec()));
            }
            _ => bail_input!(
                "{}:{}: found {line:?}, expected a prompt's tokens and those of its responses, at least 1 each",
                path.display(),
                number + 1
            ),
        }
    }
    if all.is_empty() {
        bail_input!("{}: found no line, expected a prompt's tokens and those of its responses", path.display());
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: Limits = Limits { prompt: 1024, response: 1024, sequence: 32_768 };

    fn draw(text: &str, prompts: usize, group: usize, seed: u64, limits: Limits) -> Result<Drawn> {
        Lengths::parse(text)?.draw(prompts, group, seed, limits)
    }

    #[test]
    fn gsm8k_has_the_means_that_are_documented() -> Result<()> {
        let drawn = draw("gsm8k", 2000, 5, 7, WIDE)?;
        let mean = |x: &[usize]| x.iter().sum::<usize>() as f64 / x.len() as f64;
        assert_eq!((drawn.prompts.len(), drawn.responses.len()), (2000, 10_000));
        assert!((mean(&drawn.prompts) - 102.0).abs() < 1.5, "{}", mean(&drawn.prompts));
        assert!((mean(&drawn.responses) - 149.0).abs() < 3.0, "{}", mean(&drawn.responses));
        let range = |x: &[usize]| (x.iter().min().copied(), x.iter().max().copied());
        let ((low, high), (shortest, longest)) = (range(&drawn.prompts), range(&drawn.responses));
        assert!(low >= Some(56) && high <= Some(256) && shortest >= Some(16) && longest > Some(500), "{longest:?}");
        assert_eq!(draw("gsm8k", 2000, 5, 7, WIDE)?, drawn);
        assert_ne!(draw("gsm8k", 2000, 5, 8, WIDE)?, drawn);
        assert_eq!(draw("gsm8k", 3, 5, 7, WIDE)?.responses, drawn.responses[..15], "keyed by prompt and member");
        Ok(())
    }

    #[test]
    fn lengths_are_fixed_listed_and_cut() -> Result<()> {
        let drawn = draw("7", 2, 2, 0, Limits { prompt: 10, response: 5, sequence: 100 })?;
        assert_eq!(drawn, Drawn { prompts: vec![10, 10], responses: vec![5; 4] });
        let file = tempfile::NamedTempFile::new().map_err(|e| Error::io("", e))?;
        let path = file.path().display().to_string();
        let write = |text: &str| std::fs::write(file.path(), text).map_err(|e| Error::io(file.path(), e));
        write("4 1 2\n\n9 30\n")?;
        let drawn = draw(&path, 3, 3, 0, Limits { sequence: 12, ..WIDE })?;
        assert_eq!(drawn, Drawn { prompts: vec![4, 9, 4], responses: vec![1, 2, 1, 3, 3, 3, 1, 2, 1] });
        for (text, part) in
            [("4\n", ":1: found \"4\""), ("4 1\n4 0\n", ":2: found"), ("4 x", "found"), ("\n", "no line")]
        {
            write(text)?;
            let error = draw(&path, 1, 1, 0, WIDE).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        assert!(Lengths::parse("0").is_err());
        Ok(())
    }
}
