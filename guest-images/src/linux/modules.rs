//! Kernel modules: which are needed, and in which order they are loaded.
//!
//! A Debian package has no `modules.dep`: that file is made when it is installed. But every module
//! says in its `.modinfo` what it needs, as `depends=a,b`.

use std::path::Path;

/// Module names use `-` and `_` alike.
pub(super) fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// A module's name by its file's name, which may have been compressed.
pub(super) fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file
        .strip_suffix(".xz")
        .unwrap_or(file)
        .strip_suffix(".ko")?;
    Some(plain(stem))
}

/// What a module needs, from its bytes.
pub(super) fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let rest = &module[at + KEY.len()..];
    let end = rest.iter().position(|b| *b == 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&rest[..end]);
    text.split(',')
        .filter(|n| !n.is_empty())
        .map(plain)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let module = b"\x7fELF...\0license=GPL\0depends=virtio_ring,virtio-x\0name=y\0";
        assert_eq!(depends(module), ["virtio_ring", "virtio_x"]);
        assert!(depends(b"\x7fELF\0depends=\0name=y\0").is_empty());
        assert!(depends(b"\x7fELF\0depends=cut").is_empty());
        assert!(depends(b"").is_empty());
    }

    #[test]
    fn names_are_those_of_lsmod() {
        assert_eq!(
            name_of(Path::new("/x/kvm-amd.ko")).as_deref(),
            Some("kvm_amd")
        );
        assert_eq!(
            name_of(Path::new("virtio-rng.ko.xz")).as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(name_of(Path::new("modules.builtin")), None);
    }
}
