use super::*;
use crate::testing::Loopback;
use crate::wire::FLAG_CRC;
use std::sync::Mutex;

const BYTES: u64 = 3 * BLOCK_BYTES + 512;

/// A disk in memory, which is of ones at first.
struct Memory(Mutex<(Vec<u8>, u32)>);

impl BlockSink for Memory {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), PortError> {
        let at = usize::try_from(offset)?;
        self.0.lock().unwrap().0[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn zero(&self, offset: u64, len: u64) -> Result<(), PortError> {
        let (at, len) = (usize::try_from(offset)?, usize::try_from(len)?);
        self.0.lock().unwrap().0[at..at + len].fill(0);
        Ok(())
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), PortError> {
        let at = usize::try_from(offset)?;
        into.copy_from_slice(&self.0.lock().unwrap().0[at..at + into.len()]);
        Ok(())
    }
    fn flush(&self) -> Result<(), PortError> {
        self.0.lock().unwrap().1 += 1;
        Ok(())
    }
}

fn disks() -> (Disks, Arc<Memory>) {
    let disk = Arc::new(Memory(Mutex::new((vec![1; BYTES as usize], 0))));
    let sinks = vec![Arc::clone(&disk) as Arc<dyn BlockSink>];
    let disks = Disks::new(&[BYTES], sinks, Features::SUPPORTED).unwrap();
    (disks, disk)
}

/// A frame as it would be received.
fn frame(
    disks: &mut Disks,
    header: Header,
    encoding: Encoding,
    payload: &[u8],
) -> Result<(), String> {
    let header = Header {
        encoding: encoding as u8,
        flags: if payload.is_empty() { 0 } else { FLAG_CRC },
        length: u32::try_from(payload.len()).unwrap(),
        payload_crc: crc32c::crc32c(payload),
        ..header
    };
    let bytes = [&header.encode()[..], payload].concat();
    let mut channel = Channel::new(Loopback::with(bytes));
    let header = channel.recv_header().map_err(|e| e.to_string())?;
    let result = disks.receive(&mut channel, &header);
    result.map_err(|e| e.to_string())
}

fn blocks(kind: FrameType, first: u64, count: u64) -> Header {
    Header::of_blocks(kind, 0, Run::new(first, count))
}

#[test]
fn a_disk_is_complete_when_every_block_came_and_compares() {
    let (mut disks, disk) = disks();
    let raw = Encoding::Raw;
    let block = vec![7; BLOCK_BYTES as usize];
    frame(&mut disks, blocks(FrameType::Blocks, 1, 1), raw, &block).unwrap();
    let why = disks.complete(false).unwrap_err().to_string();
    assert!(why.contains("3 blocks of disk 0 never came"), "{why}");
    frame(&mut disks, blocks(FrameType::BlocksZero, 0, 3), raw, &[]).unwrap();
    let packed = zstd::bulk::compress(&vec![9; BLOCK_BYTES as usize + 512], 1).unwrap();
    let last = blocks(FrameType::Blocks, 2, 2);
    frame(&mut disks, last, Encoding::Zstd, &packed).unwrap();
    disks.complete(false).unwrap();
    assert_eq!(disk.0.lock().unwrap().1, 1, "flushed once");
    let whole = disk.0.lock().unwrap().0.clone();
    assert!(all_zero(&whole[..2 << 16]) && whole[2 << 16..].iter().all(|b| *b == 9));
    // Compared in parts: what is zero, and what is not.
    let hash = |first: u64, count: usize| -> Vec<u8> {
        let at = first as usize * block.len();
        let end = (at + count * block.len()).min(whole.len());
        block_hashes(0, first, &whole[at..end]).collect()
    };
    frame(&mut disks, blocks(FrameType::BlocksHash, 0, 2), raw, &[]).unwrap();
    let why = disks.complete(true).unwrap_err().to_string();
    assert!(why.contains("hashes of 2 blocks"), "{why}");
    let hashes = blocks(FrameType::BlocksHash, 2, 2);
    frame(&mut disks, hashes, raw, &hash(2, 2)).unwrap();
    disks.complete(true).unwrap();
    // A byte that is not as it was.
    disk.write(BYTES - 1, &[8]).unwrap();
    frame(&mut disks, hashes, raw, &hash(2, 2)).unwrap();
    let why = disks.complete(true).unwrap_err().to_string();
    assert!(
        why.contains("in 1 blocks") && why.contains("block 3"),
        "{why}"
    );
    let (mut disks, _) = self::disks();
    frame(&mut disks, blocks(FrameType::BlocksZero, 0, 4), raw, &[]).unwrap();
    disk.write(0, &[1]).unwrap();
    frame(
        &mut disks,
        blocks(FrameType::BlocksHash, 0, 1),
        raw,
        &[0; 8],
    )
    .unwrap();
    assert!(disks.complete(true).is_err());
}

#[test]
fn nothing_is_written_outside_a_disk_nor_believed() {
    let (mut disks, disk) = disks();
    let before = disk.0.lock().unwrap().0.clone();
    let block = vec![7; BLOCK_BYTES as usize];
    let mut refused = |header, encoding, payload: &[u8], part: &str| {
        let why = frame(&mut disks, header, encoding, payload).unwrap_err();
        assert!(why.contains(part), "{why}, not {part}");
    };
    let raw = Encoding::Raw;
    let no_disk = "no disk of the guest has";
    refused(blocks(FrameType::Blocks, 4, 1), raw, &block, no_disk);
    refused(blocks(FrameType::Blocks, 3, 2), raw, &block, no_disk);
    refused(blocks(FrameType::BlocksZero, 0, 5), raw, &[], no_disk);
    let far = blocks(FrameType::BlocksZero, (1 << 48) - 1, u64::from(u32::MAX));
    refused(far, raw, &[], no_disk);
    let other = Header::of_blocks(FrameType::Blocks, 1, Run::new(0, 1));
    refused(other, raw, &block, no_disk);
    // The last block is short.
    refused(blocks(FrameType::Blocks, 3, 1), raw, &block, "65536 bytes");
    refused(blocks(FrameType::Blocks, 0, 2), raw, &block, "have 131072");
    let cannot_be = "that cannot be";
    refused(blocks(FrameType::Blocks, 0, 0), raw, &block, cannot_be);
    refused(blocks(FrameType::Blocks, 0, 1), raw, &[], cannot_be);
    let more = vec![7; block.len() + 1];
    refused(blocks(FrameType::Blocks, 0, 1), raw, &more, cannot_be);
    refused(blocks(FrameType::Blocks, 0, 17), raw, &block, cannot_be);
    refused(blocks(FrameType::BlocksZero, 0, 1), raw, &[1], cannot_be);
    refused(blocks(FrameType::BlocksHash, 0, 2), raw, &[1; 8], cannot_be);
    // A bomb, and no zstd at all.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let zstd = Encoding::Zstd;
    refused(blocks(FrameType::Blocks, 0, 1), zstd, &bomb, "decompressed");
    refused(
        blocks(FrameType::Blocks, 0, 1),
        zstd,
        &[3; 99],
        "decompressed",
    );
    let short = zstd::bulk::compress(&[0; 99], 1).unwrap();
    refused(
        blocks(FrameType::Blocks, 0, 1),
        zstd,
        &short,
        "sent 99 bytes",
    );
    refused(
        blocks(FrameType::Blocks, 0, 1),
        Encoding::Patch,
        &short,
        "encoding 2",
    );
    disks.coded = false;
    let why = frame(&mut disks, blocks(FrameType::Blocks, 0, 1), zstd, &short).unwrap_err();
    assert!(why.contains("not agreed on"), "{why}");
    assert!(disk.0.lock().unwrap().0 == before);
}

#[test]
fn sizes_that_cannot_be_are_refused_before_anything_is_made() {
    for bytes in [&[][..], &[0], &[1, 0], &[u64::MAX], &[1 << 47, 1], &[1; 65]] {
        assert!(Disks::check(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&[1][..], &[1 << 47], &[1 << 40; 64]] {
        assert!(Disks::check(bytes).is_ok(), "{bytes:?}");
    }
    assert!(Disks::new(&[1, 2], Vec::new(), Features::SUPPORTED).is_err());
}
