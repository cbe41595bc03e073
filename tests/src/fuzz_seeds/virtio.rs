//! What a driver does.

/// A driver's first steps, as a script of `fuzz_bodies::virtio`: negotiates, sets each queue up,
/// and offers a chain of a readable and a writable buffer in it.
pub(super) fn driver(kind: u8, queues: u32) -> Vec<u8> {
    let mut script = vec![kind];
    let register = |script: &mut Vec<u8>, offset: u8, value: u32| {
        script.push(offset / 4);
        script.extend(value.to_le_bytes());
    };
    let store = |script: &mut Vec<u8>, at: u32, bytes: &[u8]| {
        for (at, bytes) in (at..).step_by(32).zip(bytes.chunks(32)) {
            script.push(120);
            script.extend(at.to_le_bytes());
            script.push(u8::try_from(bytes.len()).unwrap());
            script.extend(bytes);
        }
    };
    for (offset, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x24, 0),
        (0x20, 0x22),
        (0x70, 11),
    ] {
        register(&mut script, offset, value);
    }
    for queue in 0..queues {
        let base = 0x1_0000 * (queue + 1);
        for (offset, value) in [
            (0x30, queue),
            (0x38, 8),
            (0x80, base),
            (0x90, base + 0x1000),
            (0xa0, base + 0x2000),
            (0x44, 1),
        ] {
            register(&mut script, offset, value);
        }
        let mut chain = Vec::new();
        for (address, len, flags, next) in [
            (base + 0x3000, 528u32, 1u16, 1u16),
            (base + 0x4000, 4096, 2, 0),
        ] {
            chain.extend(u64::from(address).to_le_bytes());
            chain.extend(len.to_le_bytes());
            chain.extend(flags.to_le_bytes());
            chain.extend(next.to_le_bytes());
        }
        store(&mut script, base, &chain);
        store(
            &mut script,
            base + 0x3000,
            &[
                u8::try_from(queue).unwrap(),
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                1,
                0,
                0,
                0,
            ],
        );
        store(&mut script, base + 0x1000, &[0, 0, 1, 0, 0, 0]);
    }
    register(&mut script, 0x70, 15);
    for queue in 0..queues {
        script.push(220 + u8::try_from(queue).unwrap());
    }
    // A pause, and a move.
    script.extend([240, 255]);
    script
}
