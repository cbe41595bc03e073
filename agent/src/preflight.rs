//! Whether a guest can come: what would fail later is said before anything is started.

use crate::commands::Guest;
use crate::settings::Settings;
use crate::types::Wanted;
use ferry_terminal::names::GuestName;
use ferry_terminal::units::memory;
use ferry_vmm::memory::available_memory;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The most disks or network cards of a guest.
const MOST_DEVICES: usize = 16;

/// Checks whether a guest can come to this host.
///
/// # Errors
/// All that is wrong, in a sentence each.
pub fn check(wanted: &Wanted, settings: &Settings, guests: &[Guest]) -> Result<GuestName, String> {
    let name: GuestName = wanted.name.parse().map_err(|why: String| why)?;
    let mut wrong = Vec::new();
    if guests
        .iter()
        .any(|guest| guest.name == wanted.name && guest.state != "stale")
    {
        wrong.push(format!("a guest of the name {name} is here already"));
    }
    let available = available_memory().unwrap_or(0);
    if wanted.memory_bytes > available {
        wrong.push(format!(
            "the guest has {} of memory, and {} are available here",
            memory(wanted.memory_bytes),
            memory(available)
        ));
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        wrong.push(format!("/dev/kvm cannot be used ({error})"));
    }
    if wanted.disks.len().max(wanted.networks.len()) > MOST_DEVICES {
        return Err(format!(
            "a guest has at most {MOST_DEVICES} disks or network cards"
        ));
    }
    for disk in &wanted.disks {
        let here = settings.disk(&disk.path);
        wrong.extend(check_disk(
            &here,
            disk.bytes,
            wanted.copy_disk && !disk.read_only,
        ));
    }
    for network in &wanted.networks {
        let tap = settings.tap(&network.tap);
        let plain = !tap.is_empty() && !tap.contains(['/', ',', '\0']) && tap != "." && tap != "..";
        if !plain || !Path::new("/sys/class/net").join(&tap).exists() {
            wrong.push(format!(
                "there is no network device {} here",
                tap.escape_debug()
            ));
        }
    }
    wrong.extend(wanted.vsock.as_deref().and_then(check_socket));
    if wrong.is_empty() {
        Ok(name)
    } else {
        Err(wrong.join("; "))
    }
}

/// What is wrong with the path of a socket that is to be made, if anything.
fn check_socket(path: &Path) -> Option<String> {
    let shown = path.display();
    if !path.is_absolute() || path.to_str().is_none_or(|path| path.contains(',')) {
        return Some(format!(
            "the vsock's socket {shown} has a path that --vsock does not take"
        ));
    }
    if !path.parent().is_some_and(Path::is_dir) {
        return Some(format!("the vsock's socket {shown} has no folder here"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Some(format!("a process uses the vsock's socket {shown} here")),
        Err(_) => None,
    }
}

/// What is wrong with a disk, if anything.
fn check_disk(here: &Path, bytes: u64, is_made: bool) -> Option<String> {
    let shown = here.display();
    if here
        .to_str()
        .is_none_or(|path| path.contains(',') || path.starts_with("fd:"))
    {
        return Some(format!(
            "the disk {shown} has a name that --disk does not take"
        ));
    }
    let mut file = match File::open(here) {
        Ok(file) => file,
        Err(error) if is_made && error.kind() == std::io::ErrorKind::NotFound => {
            let folder = here.parent().filter(|parent| parent.is_dir());
            return folder
                .is_none()
                .then(|| format!("the disk {shown} has no folder here"));
        }
        Err(error) => return Some(format!("the disk {shown} cannot be opened here ({error})")),
    };
    match file.seek(SeekFrom::End(0)) {
        Ok(found) if found == bytes => None,
        Ok(found) => Some(format!(
            "the disk {shown} has {found} bytes here, and the guest's has {bytes}"
        )),
        Err(error) => Some(format!(
            "the size of the disk {shown} is not known ({error})"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Disk, Network};

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.img");
        std::fs::write(&image, [0; 512]).unwrap();
        let disk = |path: &Path, bytes| Disk {
            path: path.to_owned(),
            bytes,
            read_only: false,
        };
        let mut wanted = Wanted {
            name: "web".into(),
            memory_bytes: u64::MAX,
            cpus: 1,
            disks: vec![
                disk(&image, 1024),
                disk(&dir.path().join("none"), 1),
                disk(Path::new("/a,ro"), 1),
            ],
            networks: vec![
                Network {
                    tap: "no-such-tap".into(),
                },
                Network {
                    tap: "../lo".into(),
                },
            ],
            ..Wanted::default()
        };
        let settings = Settings::default();
        let guests = [Guest {
            name: "web".into(),
            state: "running".into(),
            pid: None,
        }];
        let why = check(&wanted, &settings, &guests).unwrap_err();
        for part in [
            "a guest of the name web",
            "are available here",
            "has 512 bytes here",
            "cannot be opened here",
            "does not take",
            "no network device no-such-tap",
            "no network device ../lo",
        ] {
            assert!(why.contains(part), "{part:?} is not in {why:?}");
        }
        let _used = std::os::unix::net::UnixListener::bind(dir.path().join("used")).unwrap();
        for (path, why) in [
            ("v.sock".into(), "does not take"),
            (dir.path().join("none/v.sock"), "has no folder"),
            (dir.path().join("used"), "a process uses"),
        ] {
            let found = check_socket(&path).unwrap();
            assert!(found.contains(why), "{found}");
        }
        assert_eq!(check_socket(&dir.path().join("v.sock")), None);
        // A file of the right size is no problem, nor is one that will be made.
        wanted.disks = vec![disk(&image, 512), disk(&dir.path().join("new"), 1)];
        wanted.copy_disk = true;
        let why = check(&wanted, &settings, &[]).unwrap_err();
        assert!(!why.contains("disk") && !why.contains("name web"), "{why}");
        wanted.name = "../web".into();
        assert!(
            check(&wanted, &settings, &[])
                .unwrap_err()
                .contains("a guest's name")
        );
    }
}
