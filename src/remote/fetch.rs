//! Bringing a run's files here: smallest first, each under its name only when its SHA-256 is right, and on with what a broken
//! connection left.

use std::fs::{self, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::process::ChildStdout;

use super::connection::{Connection, Input};
use super::snapshot::digest_of;
use crate::run::console::Console;
use crate::{Error, Result, bail_input};

/// Which checkpoints come along.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Checkpoints {
    None,
    Latest,
    All,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    pub files: usize,
    /// Files that were here already, with the same content.
    pub unchanged: usize,
    /// What came over the line.
    pub bytes: u64,
}

/// One file of the manifest.
struct Remote {
    /// Below the host's root.
    path: String,
    size: u64,
    here: PathBuf,
}

/// Fetches job `id` into `out/<id>`; its logs go to `out/<id>/remote/`.
///
/// # Errors
/// `Input`: no such job, or a directory that this host's run does not own. `Unavailable`: the connection broke; the same
/// command goes on.
pub fn fetch(
    connection: &Connection,
    id: &str,
    out: &Path,
    checkpoints: Checkpoints,
    console: &Console,
) -> Result<Fetched> {
    let which = match checkpoints {
        Checkpoints::None => "none",
        Checkpoints::Latest => "latest",
        Checkpoints::All => "all",
    };
    let directory = out.join(id);
    claim(&directory, &connection.host.name)?;
    let mut fetched = Fetched::default();
    // A file that is written meanwhile, or that a resume cut back, is asked for once more.
    for round in 0..3 {
        let manifest = connection.whole_facts("manifest", &[id, which])?;
        let mut left = Vec::new();
        for (key, value) in &manifest {
            if key == "latest" {
                continue;
            }
            let here = place(id, value, out).ok_or_else(|| {
                Error::Runtime(format!("{}: {value:?}: not a file of this job", connection.host.name))
            })?;
            let Ok(size) = key.parse() else { continue };
            left.push(Remote { path: value.clone(), size, here });
        }
        fetched.files = left.len();
        let total: u64 = left.iter().map(|file| file.size).sum();
        let mut bar = console.progress(&format!("fetching {id}"), total);
        let wrong = transfer(connection, &left, round > 0, &mut fetched, |n| bar.inc(n))?;
        bar.finish();
        for (key, value) in &manifest {
            if key == "latest" {
                link_latest(&directory, value)?;
            }
        }
        match wrong {
            None => return Ok(fetched),
            Some(path) if round == 2 => {
                return Err(Error::Runtime(format!("{path}: changes while it is fetched; try again later")));
            }
            Some(_) => {}
        }
    }
    Ok(fetched)
}

/// Marks the directory as a copy of what lies on `host`, unless it is something else.
fn claim(directory: &Path, host: &str) -> Result<()> {
    let marker = directory.join("remote/host");
    match fs::read_to_string(&marker) {
        Ok(owner) if owner.trim_end() == host => return Ok(()),
        Ok(owner) => {
            bail_input!(
                "{}: was fetched from {}, not from {host}; choose another --out",
                directory.display(),
                owner.trim_end()
            )
        }
        Err(_) if directory.join("run.json").exists() => {
            bail_input!("{}: a run of this machine, not a fetched one; choose another --out", directory.display())
        }
        Err(_) => {}
    }
    let parent = directory.join("remote");
    fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
    crate::run::atomic_file::write(&marker, format!("{host}\n").as_bytes())
}

/// Where a file of the manifest goes; None for a path that leads elsewhere.
fn place(id: &str, path: &str, out: &Path) -> Option<PathBuf> {
    let plain = Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    let mut parts = path.splitn(3, '/');
    let (kind, owner, rest) = (parts.next()?, parts.next()?, parts.next()?);
    match kind {
        "runs" if plain && owner == id => Some(out.join(id).join(rest)),
        "jobs" if plain && owner == id => {
            let attempt = rest.strip_suffix("/log").filter(|n| n.chars().all(|c| c.is_ascii_digit()))?;
            Some(out.join(id).join("remote").join(format!("attempt-{attempt}.log")))
        }
        _ => None,
    }
}

fn part_of(here: &Path) -> PathBuf {
    let name = here.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    here.with_file_name(format!(".{name}.part"))
}

fn length(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|m| m.len())
}

/// All files over one call. The path of a file whose content was not what the host says; then its part was thrown away.
fn transfer(
    connection: &Connection,
    files: &[Remote],
    from_start: bool,
    fetched: &mut Fetched,
    mut progress: impl FnMut(u64),
) -> Result<Option<String>> {
    // From where each is read: a file of the right length is only compared, a part is continued.
    let starts: Vec<u64> = files
        .iter()
        .map(|file| match (length(&file.here), length(&part_of(&file.here))) {
            (Some(have), _) if have == file.size => file.size,
            (_, Some(part)) if part <= file.size && !from_start => part,
            _ => 0,
        })
        .collect();
    let wanted: String =
        files.iter().zip(&starts).map(|(file, start)| format!("{start} {} {}\n", file.size, file.path)).collect();
    let mut wanted = wanted.as_bytes();
    fetched.unchanged = 0;
    connection.exchange("read_files", &[], Input::Bytes(&mut wanted), |reader| {
        let mut wrong = None;
        for (file, start) in files.iter().zip(starts) {
            progress(start);
            let right = if start == file.size && length(&file.here) == Some(file.size) {
                let same = digest_line(reader)? == digest_of(&file.here)?.0;
                if same {
                    fetched.unchanged += 1;
                } else {
                    fs::remove_file(&file.here).map_err(|e| Error::io(&file.here, e))?;
                }
                same
            } else {
                fetched.bytes += file.size - start;
                receive(reader, file, start, &mut progress)?
            };
            if !right {
                wrong.get_or_insert(file.path.clone());
            }
        }
        Ok(wrong)
    })
}

/// Appends to the file's part, and gives it its name where the whole has the right digest.
fn receive(
    reader: &mut BufReader<ChildStdout>,
    file: &Remote,
    start: u64,
    progress: &mut impl FnMut(u64),
) -> Result<bool> {
    let part = part_of(&file.here);
    if let Some(parent) = file.here.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
    }
    let io = |e| Error::io(&part, e);
    let mut target = OpenOptions::new().create(true).append(true).open(&part).map_err(io)?;
    if start == 0 {
        target.set_len(0).map_err(io)?;
    }
    let mut buffer = vec![0; 1 << 18];
    let mut left = file.size - start;
    while left > 0 {
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = reader.read(&mut buffer[..room]).map_err(|e| Error::Runtime(e.to_string()))?;
        if n == 0 {
            return Err(cut_off());
        }
        target.write_all(&buffer[..n]).map_err(io)?;
        progress(n as u64);
        left -= n as u64;
    }
    target.sync_all().map_err(io)?;
    if digest_line(reader)? != digest_of(&part)?.0 {
        fs::remove_file(&part).map_err(io)?;
        return Ok(false);
    }
    fs::rename(&part, &file.here).map_err(|e| Error::io(&file.here, e))?;
    Ok(true)
}

fn digest_line(reader: &mut BufReader<ChildStdout>) -> Result<String> {
    let mut line = [0u8; 65];
    reader.read_exact(&mut line).map_err(|_| cut_off())?;
    Ok(String::from_utf8_lossy(&line[..64]).into_owned())
}

fn cut_off() -> Error {
    Error::Unavailable("the connection broke; the same command goes on".to_string())
}

/// `latest` as the run has it, once its target is here.
fn link_latest(directory: &Path, target: &str) -> Result<()> {
    let plain = Path::new(target).components().all(|c| matches!(c, Component::Normal(_)));
    if !plain || !directory.join(target).is_dir() {
        return Ok(());
    }
    let (link, beside) = (directory.join("latest"), directory.join(".latest.tmp"));
    let _ = fs::remove_file(&beside);
    std::os::unix::fs::symlink(target, &beside)
        .and_then(|()| fs::rename(&beside, &link))
        .map_err(|e| Error::io(&link, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let out = Path::new("out");
        let at = |path: &str| place("a-0-s0", path, out).map(|p| p.display().to_string());
        assert_eq!(at("runs/a-0-s0/tb/events").as_deref(), Some("out/a-0-s0/tb/events"));
        assert_eq!(at("jobs/a-0-s0/2/log").as_deref(), Some("out/a-0-s0/remote/attempt-2.log"));
        for path in
            ["runs/b-0-s0/x", "runs/a-0-s0/../../x", "/etc/passwd", "jobs/a-0-s0/../log", "runs/a-0-s0", "x/a-0-s0/y"]
        {
            assert_eq!(at(path), None, "{path}");
        }
    }
}
