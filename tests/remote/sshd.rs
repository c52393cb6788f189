//! An sshd of the test's own: free port, own keys, own configuration; killed and started again at will.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::wait_until;

pub struct Sshd {
    dir: tempfile::TempDir,
    program: PathBuf,
    pub port: u16,
    process: Option<Child>,
}

impl Sshd {
    /// None, with the reason printed, where there is no sshd.
    pub fn start() -> Option<Sshd> {
        let candidates = ["/usr/sbin/sshd", "/usr/local/sbin/sshd"].map(PathBuf::from);
        let Some(program) = candidates.into_iter().find(|path| path.exists()) else {
            println!("skipped: no sshd on this machine (apt-get install openssh-server)");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for key in ["host_key", "user_key"] {
            let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(at(key)).status();
            assert!(made.unwrap().success());
        }
        std::fs::copy(at("user_key.pub"), at("authorized_keys")).unwrap();
        std::fs::create_dir(at("bin")).unwrap();
        // Where sshd keeps its unprivileged part; packages make it when the service starts.
        let _ = std::fs::create_dir_all("/run/sshd");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\n\
             UsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\nSetEnv PATH={}:{}\n",
            at("host_key").display(),
            at("authorized_keys").display(),
            at("bin").display(),
            std::env::var("PATH").unwrap()
        );
        std::fs::write(at("sshd_config"), text).unwrap();
        let mut server = Sshd { program, port, process: None, dir };
        server.run();
        Some(server)
    }

    /// Programs in here come first for whoever logs in.
    pub fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    pub fn run(&mut self) {
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        let mut command = Command::new(&self.program);
        command.args(["-D", "-e", "-f"]).arg(self.dir.path().join("sshd_config"));
        self.process = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let port = self.port;
        wait_until("sshd listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    }

    /// Kills the server and everything that serves a connection, as a lost link or a restart of the service does.
    pub fn kill(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        for pid in servers_below(process.id()) {
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        }
        let _ = process.kill();
        let _ = process.wait();
    }

    /// `ssh_options` of the hosts file.
    pub fn options(&self) -> String {
        let key = self.dir.path().join("user_key");
        format!(
            "[-F, /dev/null, -p, \"{}\", -i, {}, -o, StrictHostKeyChecking=no, -o, UserKnownHostsFile=/dev/null, -o, \
             LogLevel=ERROR]",
            self.port,
            key.display()
        )
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The processes below `pid` that are sshd's own (not what was started through them).
fn servers_below(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(child) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let Some((head, tail)) = stat.rsplit_once(')') else { continue };
            let parent: Option<u32> = tail.split_whitespace().nth(1).and_then(|p| p.parse().ok());
            if parent == Some(found[at]) && head.contains("(sshd") {
                found.push(child);
            }
        }
        at += 1;
    }
    found
}

/// Whether a process is there and no zombie.
pub fn process_lives(pid: u64) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, tail)| !tail.trim_start().starts_with('Z'))
}

pub const PATIENCE: Duration = Duration::from_secs(60);
