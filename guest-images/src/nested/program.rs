//! Brings a program of this machine into a nested host, with the shared libraries that it needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{NestedError, failed};

/// The program, to be put at `/bin/NAME`, and its libraries at their own places: a path and its
/// bytes each.
///
/// # Errors
/// [`NestedError`].
pub fn program(path: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, NestedError> {
    let name = path
        .file_name()
        .ok_or_else(|| NestedError::Program(path.to_owned(), "it has no name".to_owned()))?;
    let mut files = vec![(Path::new("/bin").join(name), without_debug_info(path)?)];
    // What the dynamic linker itself would do. It fails for a static program, which needs nothing.
    let ldd = Command::new("ldd").arg(path).stdin(Stdio::null()).output();
    let ldd = ldd.map_err(|e| {
        NestedError::Program(path.to_owned(), format!("ldd cannot be started ({e})"))
    })?;
    for library in libraries(&String::from_utf8_lossy(&ldd.stdout)) {
        let library = library.map_err(|name| {
            NestedError::Program(
                path.to_owned(),
                format!("it needs {name}, which is not here"),
            )
        })?;
        let bytes = fs::read(&library).map_err(failed("read", &library))?;
        files.push((library, bytes));
    }
    Ok(files)
}

/// The paths in ldd's output; the names of libraries that are missing as errors.
fn libraries(ldd: &str) -> Vec<Result<PathBuf, String>> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [name, "=>", "not", "found"] => Some(Err((*name).to_owned())),
            [_, "=>", path, ..] | [path, ..] if path.starts_with('/') => {
                Some(Ok(PathBuf::from(path)))
            }
            _ => None,
        }
    };
    ldd.lines().filter_map(line).collect()
}

/// Most of a program that was built for debugging, which would all have to fit into the nested
/// host's memory.
fn without_debug_info(path: &Path) -> Result<Vec<u8>, NestedError> {
    let stripped = tempfile::NamedTempFile::new()?;
    let mut strip = Command::new("strip");
    strip
        .arg("--strip-debug")
        .arg("-o")
        .arg(stripped.path())
        .arg(path);
    let strip = strip
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // binutils is there wherever gcc is; without it the program is taken whole.
    let from = if strip.is_ok_and(|s| s.success()) {
        stripped.path()
    } else {
        path
    };
    fs::read(from).map_err(failed("read", from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_where_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\t/lib64/ld.so (0x00007f)\n\tlibx.so => not found\n";
        assert_eq!(
            libraries(text),
            [
                Ok("/lib/libc.so.6".into()),
                Ok("/lib64/ld.so".into()),
                Err("libx.so".to_owned())
            ]
        );
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn this_test_could_be_taken_along() {
        let me = std::env::current_exe().unwrap();
        let files = program(&me).unwrap();
        assert!(files[0].0.starts_with("/bin") && files[0].1.starts_with(b"\x7fELF"));
        assert!(
            files
                .iter()
                .any(|(p, _)| p.to_string_lossy().contains("libc.so"))
        );
    }
}
