use super::*;
use std::io::Write as _;
use std::path::Path;

const MIB: u64 = 1 << 20;
const GENERATION: [u8; 16] = *b"one of a kind id";

fn ram(bytes: u64) -> RamLayout {
    RamLayout::new(bytes, false).unwrap()
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut f = tempfile::NamedTempFile::new().unwrap();
    f.write_all(bytes).unwrap();
    f
}

/// An ELF with a PT_LOAD at `address`, a GNU note segment and, with `pvh`, a Xen note in a second
/// one.
fn elf_file(address: u64, pvh: bool) -> Vec<u8> {
    let mut gnu = Vec::new();
    for word in [4u32, 4, 3] {
        gnu.extend(word.to_le_bytes());
    }
    gnu.extend(b"GNU\0idid");
    let mut xen = Vec::new();
    for word in [4u32, 8, if pvh { 18 } else { 6 }] {
        xen.extend(word.to_le_bytes());
    }
    xen.extend(b"Xen\0");
    xen.extend((address + 0x10).to_le_bytes());
    let code = vec![0xf4u8; 0x100];
    let phdr = |kind: u32, offset: u64, addr: u64, len: u64, mem: u64| {
        let mut h = Vec::new();
        h.extend(kind.to_le_bytes());
        h.extend(7u32.to_le_bytes());
        for n in [offset, addr, addr, len, mem, 4] {
            h.extend(n.to_le_bytes());
        }
        h
    };
    let mut f = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    f.extend(2u16.to_le_bytes());
    f.extend(62u16.to_le_bytes());
    f.extend(1u32.to_le_bytes());
    f.extend((address + 0x20).to_le_bytes());
    f.extend(64u64.to_le_bytes());
    f.extend(0u64.to_le_bytes());
    f.extend(0u32.to_le_bytes());
    for n in [64u16, 56, 3, 0, 0, 0] {
        f.extend(n.to_le_bytes());
    }
    let at = 64 + 3 * 56;
    let lens = [code.len() as u64, gnu.len() as u64, xen.len() as u64];
    f.extend(phdr(1, at, address, lens[0], 0x2000));
    f.extend(phdr(4, at + lens[0], 0, lens[1], lens[1]));
    f.extend(phdr(4, at + lens[0] + lens[1], 0, lens[2], lens[2]));
    f.extend(code);
    f.extend(gnu);
    f.extend(xen);
    f
}

fn bzimage_file() -> Vec<u8> {
    let mut f = vec![0u8; 0x200 * 5 + 0x1000];
    f[0x1f1] = 4;
    f[0x200] = 0xeb;
    f[0x201] = 0x6a;
    f[0x202..0x206].copy_from_slice(b"HdrS");
    f[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    f[0x211] = 1;
    f[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    f[0x236] = 1;
    f[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    f[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    f[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    f
}

fn kernel(path: &Path) -> Kernel {
    Kernel {
        path: path.to_owned(),
        initrd: None,
        cmdline: "console=ttyS0".into(),
    }
}

fn load(k: &Kernel, ram: &RamLayout) -> Result<BootImage, LoadError> {
    let platform = Platform {
        cpus: 3,
        mmio: vec![MmioDevice {
            base: 0xd000_0000,
            size: 0x1000,
            gsi: 16,
        }],
        generation: GENERATION.into(),
        numa: None,
    };
    super::load(k, ram, &platform)
}

fn bytes_at(image: &BootImage, address: u64) -> &[u8] {
    let write = image.writes.iter().find(|w| w.address == address).unwrap();
    match &write.data {
        WriteData::Bytes(b) => b,
        WriteData::File { .. } => panic!("bytes expected"),
    }
}

#[test]
fn a_pvh_kernel_is_entered_by_its_note_with_start_info() {
    let f = file(&elf_file(0x10_0000, true));
    let initrd = file(&[9; 5000]);
    let mut k = kernel(f.path());
    k.initrd = Some(initrd.path().to_owned());
    let image = load(&k, &ram(64 * MIB)).unwrap();
    let Entry::Protected32 { eip, ebx, .. } = image.entry else {
        panic!("32-bit entry")
    };
    assert_eq!((eip, ebx), (0x10_0010, 0x6000));
    let info = bytes_at(&image, 0x6000);
    let word = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap());
    assert_eq!(word(0), 0x1_336e_c578);
    assert_eq!(word(8), 1 << 32, "one module");
    assert_eq!(bytes_at(&image, word(24)), b"console=ttyS0\0");
    assert_eq!(bytes_at(&image, word(40)).len(), 3 * 24);
    assert_eq!(info[48], 3);
    let module = bytes_at(&image, word(16));
    let at = u64::from_le_bytes(module[..8].try_into().unwrap());
    assert_eq!(at, 64 * MIB - 8192);
    assert!(
        image
            .writes
            .iter()
            .any(|w| w.address == at && w.len() == 5000)
    );
}

#[test]
fn an_elf_without_the_note_is_a_vmlinux() {
    let f = file(&elf_file(0x100_0000, false));
    let image = load(&kernel(f.path()), &ram(5 << 30)).unwrap();
    let Entry::Long64 { rip, rsi, cr3, .. } = image.entry else {
        panic!("64-bit entry")
    };
    assert_eq!((rip, rsi, cr3), (0x100_0020, 0x7000, 0x9000));
    let params = bytes_at(&image, 0x7000);
    assert_eq!(params.len(), 4096);
    assert_eq!(params[0x1e8], 4, "with the memory above 4 GiB");
    assert_eq!(bytes_at(&image, 0x9000).len(), 6 * 4096);
}

#[test]
fn a_bzimage_is_entered_at_its_64_bit_entry() {
    let f = file(&bzimage_file());
    let initrd = file(&[9; 100]);
    let mut k = kernel(f.path());
    k.initrd = Some(initrd.path().to_owned());
    let image = load(&k, &ram(64 * MIB)).unwrap();
    let Entry::Long64 { rip, .. } = image.entry else {
        panic!("64-bit entry")
    };
    assert_eq!(rip, 0x100_0200);
    let params = bytes_at(&image, 0x7000);
    assert_eq!(params[0x210], 0xff);
    assert_eq!(&params[0x218..0x220], [0, 0xf0, 0xff, 3, 100, 0, 0, 0]);
}

/// By either protocol: the id is where the tables say, and no kernel takes that for RAM.
#[test]
fn the_generation_id_is_in_reserved_memory() {
    let files = [true, false].map(|pvh| file(&elf_file(0x10_0000, pvh)));
    for (file, map, entry) in [(&files[0], 0x7000, 24), (&files[1], 0x72d0, 20)] {
        let image = load(&kernel(file.path()), &ram(64 * MIB)).unwrap();
        let page = bytes_at(&image, 0xe_f000);
        assert_eq!(page[..16], GENERATION_MARK);
        assert_eq!(page[16..], GENERATION);
        // In E820's or PVH's words: address, size, kind.
        let params = image.writes.iter().find(|w| w.address == 0x7000).unwrap();
        let WriteData::Bytes(bytes) = &params.data else {
            panic!("bytes expected")
        };
        let ranges = bytes[map - 0x7000..].chunks_exact(entry).take(3);
        let range = |bytes: &[u8]| {
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            (word(0), word(0) + word(8), bytes[16])
        };
        let covers = |(start, end, _): &(u64, u64, u8)| *start < 0xf_0000 && *end > 0xe_f000;
        let over: Vec<_> = ranges.map(range).filter(covers).collect();
        assert_eq!(over, [(0x9_fc00, 0x10_0000, 2)]);
    }
}

#[test]
fn every_refusal_is_a_sentence_with_the_path() {
    let good = file(&elf_file(0x10_0000, true));
    let text = file(b"#!/bin/sh\necho this is long enough to be read and still no kernel at all");
    let low = file(&elf_file(0x9000, true));
    let bios = file(&elf_file(0x9_f000, true));
    let dir = tempfile::tempdir().unwrap();
    let big = tempfile::NamedTempFile::new().unwrap();
    big.as_file().set_len(100 * MIB).unwrap();
    let cases = [
        (kernel(&dir.path().join("none")), 64, "does not exist"),
        (kernel(dir.path()), 64, "not a regular file"),
        (kernel(Path::new("/dev/null")), 64, "not a regular file"),
        (kernel(text.path()), 64, "not a kernel"),
        (kernel(low.path()), 64, "taken by"),
        (kernel(bios.path()), 64, "BIOS area"),
        (kernel(good.path()), 1, "more memory"),
        (
            Kernel {
                cmdline: "x".repeat(2048),
                ..kernel(good.path())
            },
            64,
            "2048",
        ),
        (
            Kernel {
                cmdline: "a\0b".into(),
                ..kernel(good.path())
            },
            64,
            "NUL",
        ),
        (
            Kernel {
                initrd: Some(big.path().into()),
                ..kernel(good.path())
            },
            64,
            "does not fit",
        ),
        (
            Kernel {
                initrd: Some(dir.path().join("no")),
                ..kernel(good.path())
            },
            64,
            "initrd",
        ),
    ];
    for (k, mib, want) in cases {
        let error = load(&k, &ram(mib * MIB)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        let path = k.initrd.as_ref().unwrap_or(&k.path);
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    let high = file(&elf_file(u64::MAX - 0x100, true));
    assert!(matches!(
        load(&kernel(high.path()), &ram(MIB * 64)),
        Err(LoadError::TooBig { .. })
    ));
}

/// Whatever a damaged kernel leads to, the writes lie in RAM and apart from each other.
fn check(image: &BootImage, ram: &RamLayout) {
    let mut ranges: Vec<_> = image
        .writes
        .iter()
        .map(|w| (w.address, w.address + w.len()))
        .collect();
    ranges.sort_unstable();
    for (start, end) in &ranges {
        assert!(ram.contains(*start, end - start));
    }
    for pair in ranges.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
    }
}

#[test]
fn truncated_and_flipped_kernels_never_panic() {
    let ram = ram(64 * MIB);
    for good in [
        elf_file(0x10_0000, true),
        elf_file(0x10_0000, false),
        bzimage_file(),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        let try_one = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            if let Ok(image) = load(&kernel(&path), &ram) {
                check(&image, &ram);
            }
        };
        for len in (0..good.len().min(0x700)).step_by(3) {
            try_one(&good[..len]);
        }
        // All bits of all headers: the ELF's first 232 bytes and its notes, the bzImage's setup
        // header.
        for at in (0..good.len().min(232)).chain(0x1f1..good.len().min(0x270)) {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                try_one(&bad);
            }
        }
        for at in (0..good.len().min(0x270)).step_by(8) {
            for fill in [0xff, 0x00, 0x7f] {
                let mut bad = good.clone();
                let end = (at + 8).min(bad.len());
                bad[at..end].fill(fill);
                try_one(&bad);
            }
        }
    }
}
