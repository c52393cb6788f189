//! Text as one word of a POSIX shell's command line.

/// `text` as one word: unchanged where nothing in it is special, else in single quotes, in which nothing is.
pub fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_string();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Words with blanks between them.
pub fn line<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> String {
    words.into_iter().map(|w| word(w.as_ref())).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_written() -> std::io::Result<()> {
        let words =
            ["", "a b", "it's", "$(touch x)`y`", "\"", "\\", "-n", "*", "~", "a\nb", ";|&<>", "é", "#x", "!", "'"];
        for word_text in words {
            let script = format!("printf '%s|' {}", line(["first", word_text]));
            let output = std::process::Command::new("sh").args(["-c", &script]).output()?;
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("first|{word_text}|"));
        }
        assert_eq!(line(["scp", "a/b.c"]), "scp a/b.c");
        Ok(())
    }
}
