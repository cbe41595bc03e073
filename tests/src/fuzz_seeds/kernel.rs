//! Kernels of a few bytes: all that is looked at before one is booted.

/// An ELF of a piece at `address`, entered 32 bytes into it; and with a PVH note, if so, entered
/// there.
pub(super) fn elf(address: u64, pvh: bool) -> Vec<u8> {
    const HEADERS: usize = 64 + 2 * 56;
    const CODE: usize = 256;
    let mut note = [4_u32, 8, 18].map(u32::to_le_bytes).concat();
    note.extend(b"Xen\0");
    note.extend(address.to_le_bytes());
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(HEADERS + CODE, 0);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &(address + 32).to_le_bytes());
    put(32, &[64]);
    put(52, &[64, 0, 56, 0, 1 + u8::from(pvh)]);
    for (at, kind, fields) in [
        (64, 1, [HEADERS, CODE, 2 * CODE]),
        (64 + 56, 4, [HEADERS + CODE, note.len(), note.len()]),
    ] {
        put(at, &[kind]);
        for (at, field) in [at + 8, at + 32, at + 40].into_iter().zip(fields) {
            put(at, &field.to_le_bytes());
        }
        put(at + 24, &address.to_le_bytes());
    }
    file.extend(note);
    file
}

/// A bzImage of one sector of setup, to be loaded at 16 MiB.
pub(super) fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 4 * 512];
    for (at, bytes) in [
        (0x1f1, &[1][..]),
        (0x201, &[0x6a]),
        (0x202, b"HdrS\x0f\x02"),
        (0x211, &[1]),
        (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
        (0x236, &[1]),
        (0x238, &[0xff, 7]),
        (0x258, &[0, 0, 0, 1]),
        (0x260, &[0, 0, 0x10]),
    ] {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file
}
