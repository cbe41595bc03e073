use super::*;
use proptest::prelude::*;

const LIMITS: Limits = Limits { end: 1000 };

fn pages_header(count: u32, pages: u64) -> Header {
    Header {
        length: count * 8 + u32::try_from(pages * 4096).unwrap(),
        count,
        gfn: 5,
        ..Header::bare(FrameType::Pages, 3)
    }
}

#[test]
fn round_trips() {
    let header = pages_header(2, 9);
    assert_eq!(Header::decode(&header.encode(), LIMITS), Ok(header));
    assert_eq!((header.table_bytes(), header.body_pages()), (16, 9));
    let coded = Header {
        encoding: Encoding::Patch as u8,
        flags: FLAG_CRC,
        length: 16 + 77,
        ..header
    };
    assert_eq!(Header::decode(&coded.encode(), LIMITS), Ok(coded));
    assert_eq!(
        (coded.encoding(), coded.body_bytes()),
        (Encoding::Patch, 77)
    );
}

#[test]
fn every_flipped_bit_is_refused() {
    let good = pages_header(2, 9).encode();
    for bit in 0..HEADER_BYTES * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&bad, LIMITS).is_err(), "bit {bit}");
    }
}

#[test]
fn lies_are_refused_even_with_a_good_checksum() {
    let bare = |kind| Header::bare(kind, 0);
    let lies = [
        Header {
            length: u32::MAX,
            flags: FLAG_CRC,
            ..bare(FrameType::State)
        },
        Header {
            length: u32::MAX,
            ..pages_header(1, 1)
        },
        Header {
            length: 8 + 4095,
            ..pages_header(1, 1)
        },
        Header {
            count: 0,
            length: 4096,
            ..pages_header(1, 1)
        },
        Header {
            count: MAX_RUNS + 1,
            ..pages_header(1, 1)
        },
        Header {
            count: u32::MAX,
            ..pages_header(1, 1)
        },
        pages_header(3, 2),
        Header {
            gfn: 1000,
            ..pages_header(1, 1)
        },
        Header {
            gfn: u64::MAX,
            ..pages_header(1, 1)
        },
        Header {
            length: 1,
            ..bare(FrameType::Commit)
        },
        Header {
            length: 4 << 20,
            flags: FLAG_CRC,
            ..bare(FrameType::Hello)
        },
        Header {
            length: 10,
            ..bare(FrameType::Abort)
        },
        Header {
            flags: 2,
            ..bare(FrameType::RoundEnd)
        },
        Header {
            encoding: 9,
            flags: FLAG_CRC,
            ..pages_header(1, 1)
        },
        // Coded pages are always checked,
        Header {
            encoding: 1,
            ..pages_header(1, 1)
        },
        // have at least a byte,
        Header {
            encoding: 1,
            flags: FLAG_CRC,
            length: 8,
            ..pages_header(1, 1)
        },
        // and are never more than both sides' buffers hold;
        Header {
            encoding: 2,
            flags: FLAG_CRC,
            ..pages_header(1, 300)
        },
        // no other frame is coded.
        Header {
            encoding: 1,
            flags: FLAG_CRC,
            count: 1,
            length: 8,
            ..bare(FrameType::Zero)
        },
        Header {
            gfn: 999,
            count: 2,
            ..bare(FrameType::PageRequest)
        },
        Header {
            gfn: 990,
            count: 20,
            length: 160,
            flags: FLAG_CRC,
            ..bare(FrameType::Verify)
        },
    ];
    for lie in lies {
        assert!(Header::decode(&lie.encode(), LIMITS).is_err(), "{lie:?}");
    }
    // Before the handshake no frame may be about pages.
    assert!(Header::decode(&pages_header(1, 1).encode(), Limits { end: 0 }).is_err());
}

proptest! {
    #[test]
    fn run_tables_round_trip(list in proptest::collection::vec((0..1u64 << 32, 1..=1u64 << 16), 0..50)) {
        let runs: Vec<Run> = list.into_iter().map(|(f, c)| Run::new(f, c)).collect();
        let mut bytes = Vec::new();
        encode_runs(&runs, &mut bytes);
        let mut back = Vec::new();
        let pages = decode_runs(&bytes, &mut back);
        prop_assert_eq!(pages, runs.iter().map(|r| r.count).sum::<u64>());
        prop_assert_eq!(back, runs);
    }

    #[test]
    fn any_bytes_are_read_or_refused(mut bytes in proptest::array::uniform32(any::<u8>()), fix in any::<bool>()) {
        if fix {
            let crc = crc32c::crc32c(&bytes[..28]);
            bytes[28..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(header) = Header::decode(&bytes, LIMITS) {
            prop_assert!(header.length <= header.kind.max_payload());
            prop_assert_eq!(header.encode()[..28].to_vec(), {
                let mut same = bytes[..28].to_vec();
                same[3] = 0;
                same
            });
        }
    }
}
