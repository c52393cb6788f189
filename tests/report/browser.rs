//! The page in a real browser: it complains of nothing, asks nobody for anything, and shows something.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::runs::pair;
use crate::{page_of, text};

const CHROMIUM: &str = "/usr/bin/chromium";

struct Seen {
    console: Vec<String>,
    /// Hosts that the page asked for something.
    hosts: BTreeSet<String>,
    screenshot_bytes: u64,
}

/// None where there is no browser.
fn open(page: &Path, extra: &[&str]) -> Option<Seen> {
    if !Path::new(CHROMIUM).exists() {
        println!("skipped a page in a browser: chromium is not installed");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let (profile, log, shot) = (dir.path().join("profile"), dir.path().join("net.json"), dir.path().join("shot.png"));
    let output = Command::new(CHROMIUM)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"])
        .args(["--enable-logging=stderr", "--v=0", "--window-size=1280,1600", "--host-resolver-rules=MAP * ~NOTFOUND"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--log-net-log={}", log.display()))
        .arg(format!("--screenshot={}", shot.display()))
        .args(extra)
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let screenshot_bytes = std::fs::metadata(&shot).unwrap_or_else(|_| panic!("no screenshot: {stderr}")).len();
    let network = std::fs::read_to_string(&log).unwrap();
    let urls = network.split("\"url\":\"").skip(1).filter_map(|rest| rest.split('"').next());
    let hosts = urls.filter_map(|url| url.split_once("//")?.1.split('/').next().map(str::to_string));
    // The browser asks its maker for the time and the like, whatever the page.
    const ITS_OWN: [&str; 3] = ["google.com", "googleapis.com", "gvt1.com"];
    let hosts = hosts.filter(|host| !host.is_empty() && !ITS_OWN.iter().any(|own| host.ends_with(own)));
    Some(Seen {
        console: stderr.lines().filter(|line| line.contains(":CONSOLE")).map(str::to_string).collect(),
        hosts: hosts.collect(),
        screenshot_bytes,
    })
}

#[test]
fn a_browser_shows_the_page_and_asks_nobody() {
    let dir = tempfile::tempdir().unwrap();
    // First a page with the faults that must be seen, else their absence means nothing.
    let faulty = dir.path().join("faulty.html");
    std::fs::write(&faulty, "<img src='http://example.test/x.png'><script>console.error('boom')</script>").unwrap();
    let Some(seen) = open(&faulty, &[]) else { return };
    assert!(seen.hosts.contains("example.test") && seen.console.iter().any(|line| line.contains("boom")));
    let blank = seen.screenshot_bytes;

    pair(&dir.path().join("runs"));
    page_of(&dir.path().join("runs"));
    // Any code of the page that fails would say so; a pointer over every figure runs what there is.
    let page = dir.path().join("runs.html");
    let moved = std::fs::read_to_string(&page).unwrap().replace(
        "</body>",
        "<script>for (const plot of document.querySelectorAll('.plot')) { const box = plot.getBoundingClientRect(); document.getElementById('tip').hidden = true;\n\
         plot.dispatchEvent(new PointerEvent('pointermove', { clientX: box.left + box.width / 2, clientY: box.top + box.height / 4 }));\n\
         if (document.getElementById('tip').hidden) console.error('no tooltip: ' + plot.parentNode.id); }\n\
         for (const button of document.querySelectorAll('.legend button')) { button.click(); button.click(); }</script></body>",
    );
    let with_pointer = dir.path().join("pointer.html");
    std::fs::write(&with_pointer, moved).unwrap();
    for (path, extra) in [(&page, &["--blink-settings=preferredColorScheme=0"][..]), (&page, &[]), (&with_pointer, &[])]
    {
        let seen = open(path, extra).unwrap();
        assert_eq!(seen.console, Vec::<String>::new(), "{}", text(path));
        assert_eq!(seen.hosts, BTreeSet::new());
        assert!(seen.screenshot_bytes > 5 * blank, "{} bytes, a blank page has {blank}", seen.screenshot_bytes);
    }
}
