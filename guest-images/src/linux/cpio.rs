//! The archive format of an initial RAM disk: cpio "newc" (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;

use super::LinuxError;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;

/// An archive in the making.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    /// Adds a file and the directories above it. `path` has no leading slash.
    pub(super) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<(), LinuxError> {
        for (at, _) in path.match_indices('/') {
            let directory = &path[..at];
            if self.directories.insert(directory.to_owned()) {
                self.entry(directory, DIRECTORY, &[])?;
            }
        }
        self.entry(path, FILE | mode, data)
    }

    /// Adds an empty directory.
    pub(super) fn directory(&mut self, path: &str) -> Result<(), LinuxError> {
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY, &[])?;
        }
        Ok(())
    }

    /// The archive with its end marker.
    pub(super) fn finish(mut self) -> Vec<u8> {
        // The name is fixed and the data empty: this cannot be too large.
        let _ = self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<(), LinuxError> {
        let too_large = |_| LinuxError::TooLarge(path.to_owned());
        let size = u32::try_from(data.len()).map_err(too_large)?;
        let name = u32::try_from(path.len() + 1).map_err(too_large)?;
        self.entries += 1;
        // Magic; then inode, mode, uid, gid, links, mtime, size, device (2), its device (2), name's
        // size, checksum.
        self.bytes.extend(b"070701");
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0] {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, modes and contents, read by the format's rules.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let data = (110 + name).next_multiple_of(4);
            let text = std::str::from_utf8(&bytes[110..110 + name - 1]).unwrap();
            assert_eq!(bytes[110 + name - 1], 0);
            if text == "TRAILER!!!" {
                return all;
            }
            all.push((
                text.to_owned(),
                u32::try_from(mode).unwrap(),
                bytes[data..data + size].to_vec(),
            ));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn files_come_after_their_directories_and_those_come_once() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"abc").unwrap();
        archive.file("a/b/one", 0o644, b"12345").unwrap();
        archive.file("a/b/two", 0o644, b"").unwrap();
        archive.directory("a/b").unwrap();
        let all = read(&archive.finish());
        let names: Vec<&str> = all.iter().map(|e| e.0.as_str()).collect();
        assert_eq!(names, ["init", "a", "a/b", "a/b/one", "a/b/two"]);
        assert_eq!(all[0], ("init".to_owned(), 0o100_755, b"abc".to_vec()));
        assert_eq!(all[1].1, 0o040_755);
        assert_eq!(all[3].2, b"12345");
    }
}
