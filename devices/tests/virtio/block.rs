use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ferry_devices::block::{BLOCK, Block, Disk, DiskError};
use tempfile::NamedTempFile;

use crate::driver::{DATA, Driver, Memory, eventually, memory};

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where requests' headers and statuses are: 32 bytes for each number.
const HEADERS: u64 = DATA;
/// Where their data is: 64 KiB for each.
const BUFFERS: u64 = DATA + 0x10_0000;

/// A file in memory, where there is such a place: a disk that is busy with something else must not
/// look like one that does not answer.
fn image_file() -> NamedTempFile {
    NamedTempFile::new_in("/dev/shm")
        .or_else(|_| NamedTempFile::new())
        .unwrap()
}

pub fn image(sectors: u64) -> NamedTempFile {
    let file = image_file();
    for sector in 0..sectors {
        file.as_file()
            .write_all_at(&pattern(sector), sector * 512)
            .unwrap();
    }
    file
}

pub fn pattern(sector: u64) -> [u8; 512] {
    std::array::from_fn(|i| (sector * 7 + i as u64) as u8)
}

pub fn disk(file: &NamedTempFile, read_only: bool) -> Arc<Disk> {
    Arc::new(Disk::open(file.path(), read_only).unwrap())
}

pub fn device(disk: &Arc<Disk>, memory: Arc<Memory>) -> Block<Memory> {
    Block::new(Arc::clone(disk), "a disk", memory).unwrap()
}

fn start(disk: &Arc<Disk>) -> Driver<Block<Memory>> {
    let memory = memory();
    Driver::start(device(disk, Arc::clone(&memory)), memory, u64::MAX, 64)
}

impl Driver<Block<Memory>> {
    pub fn buffer(n: u64) -> u64 {
        BUFFERS + n * 0x1_0000
    }

    /// Makes request number `n` available; `len` bytes at its buffer are its data.
    pub fn request(&mut self, n: u64, kind: u32, sector: u64, len: u32) -> u16 {
        let (header, status) = (HEADERS + n * 32, HEADERS + n * 32 + 16);
        let mut bytes = [0xee; 17];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        self.put(header, &bytes);
        // In two pieces, where there are two: most drivers' buffers are scattered.
        let at = Self::buffer(n);
        let half = len / 2;
        let mut parts = vec![(at, half), (at + u64::from(half), len - half)];
        parts.retain(|(_, n)| *n > 0);
        let mut readable = vec![(header, 16)];
        let mut writable = Vec::new();
        if matches!(kind, READ | GET_ID) {
            writable.extend(parts);
        } else {
            readable.extend(parts);
        }
        writable.push((status, 1));
        self.add(0, &readable, &writable)
    }

    pub fn answer(&self, n: u64) -> u8 {
        self.get(HEADERS + n * 32 + 16, 1)[0]
    }

    /// One request alone; its status.
    fn ask(&mut self, kind: u32, sector: u64, len: u32) -> u8 {
        let head = self.request(0, kind, sector, len);
        self.kick(0);
        let (used, written) = self.wait(0);
        assert_eq!(used, head);
        let status = self.answer(0);
        if status == OK {
            let data = match kind {
                READ => len,
                GET_ID => len.min(20),
                _ => 0,
            };
            assert_eq!(written, data + 1);
        }
        status
    }
}

fn ranges(driver: &Driver<Block<Memory>>, ranges: &[(u64, u32, u32)]) -> u32 {
    let bytes: Vec<u8> = ranges
        .iter()
        .flat_map(|(sector, count, flags)| {
            [
                &sector.to_le_bytes()[..],
                &count.to_le_bytes(),
                &flags.to_le_bytes(),
            ]
            .concat()
        })
        .collect();
    driver.put(Driver::<Block<Memory>>::buffer(0), &bytes);
    bytes.len() as u32
}

#[test]
fn sectors_are_read_and_written() {
    let file = image(64);
    let disk = disk(&file, false);
    let mut d = start(&disk);
    assert_eq!(u64::from_le_bytes(d.config(0)), 64);
    assert_eq!(u32::from_le_bytes(d.config(8)), 256 << 10, "size_max");
    assert_eq!(u32::from_le_bytes(d.config(12)), 254, "seg_max");
    assert_eq!(d.ask(READ, 3, 1024), OK);
    let at = Driver::<Block<Memory>>::buffer(0);
    assert_eq!(d.get(at, 1024), [pattern(3), pattern(4)].concat());
    disk.written().start(disk.bytes());
    d.put(at, &[0xab; 1536]);
    assert_eq!(d.ask(WRITE, 60, 1536), OK);
    assert_eq!(disk.written().take(), Some(vec![1]));
    assert_eq!(d.ask(FLUSH, 0, 0), OK);
    let mut read = [0; 2048];
    file.as_file().read_exact_at(&mut read, 60 * 512).unwrap();
    assert_eq!(read[..1536], [0xab; 1536]);
    assert_eq!(read[1536..], pattern(63));
    assert_eq!(d.ask(GET_ID, 0, 20), OK);
    assert_eq!(&d.get(at, 7), b"a disk\0");
}

#[test]
fn what_the_device_writes_is_tracked_as_dirty() {
    use vm_memory::GuestMemoryBackend;
    use vm_memory::bitmap::Bitmap;
    let file = image(64);
    let mut d = start(&disk(&file, false));
    let memory = Arc::clone(&d.memory);
    let region = memory.mmap.iter().next().unwrap();
    region.bitmap().reset();
    assert_eq!(d.ask(READ, 0, 8192), OK);
    let at = Driver::<Block<Memory>>::buffer(0);
    for address in [at, at + 4096, HEADERS + 16, d.rings[0].used()] {
        assert!(region.bitmap().dirty_at(address as usize), "{address:#x}");
    }
    assert!(!region.bitmap().dirty_at(at as usize + 8192));
}

#[test]
fn many_requests_are_under_way_at_once() {
    let file = image(4096);
    let mut d = start(&disk(&file, false));
    for round in 0..20 {
        let heads: Vec<u16> = (0..16)
            .map(|n| d.request(n, READ, (round * 16 + n) * 8, 4096))
            .collect();
        d.kick(0);
        let mut back: Vec<u16> = (0..16).map(|_| d.wait(0).0).collect();
        back.sort_unstable();
        let mut heads = heads;
        heads.sort_unstable();
        assert_eq!(back, heads);
        for n in 0..16 {
            assert_eq!(d.answer(n), OK);
            let at = Driver::<Block<Memory>>::buffer(n);
            assert_eq!(d.get(at, 512), pattern((round * 16 + n) * 8));
        }
    }
    assert!(d.interrupts() > 0);
}

#[test]
fn requests_that_cannot_be_fail_alone() {
    let file = image(64);
    let mut d = start(&disk(&file, false));
    for (kind, sector, len, status) in [
        (READ, 64, 512, IOERR),
        (READ, 63, 1024, IOERR),
        (READ, u64::MAX, 512, IOERR),
        (READ, u64::MAX / 512, 1024, IOERR),
        (READ, 0, 511, IOERR),
        (WRITE, 64, 512, IOERR),
        (WRITE, 0, 100, IOERR),
        (77, 0, 512, UNSUPP),
        (u32::MAX, 0, 0, UNSUPP),
        (READ, 0, 0, OK),
        (READ, 63, 512, OK),
    ] {
        assert_eq!(d.ask(kind, sector, len), status, "{kind} {sector} {len}");
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), 64 * 512);
}

#[test]
fn a_request_is_not_longer_than_a_pause_can_wait_for() {
    let file = image_file();
    file.as_file().set_len(1 << 30).unwrap();
    let memory = memory();
    let disk = disk(&file, false);
    let mut d = Driver::start(device(&disk, Arc::clone(&memory)), memory, u64::MAX, 128);
    // The same MiB again and again, to read much into little memory.
    for (mib, status) in [(65, IOERR), (1, OK)] {
        d.put(HEADERS, &[0; 17]);
        let mut writable = vec![(Driver::<Block<Memory>>::buffer(0), 1 << 20); mib];
        writable.push((HEADERS + 16, 1));
        d.add(0, &[(HEADERS, 16)], &writable);
        d.kick(0);
        d.wait(0);
        assert_eq!(d.answer(0), status, "{mib} MiB");
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let file = image(4096);
    let disk = disk(&file, false);
    let mut d = start(&disk);
    disk.written().start(disk.bytes());
    let len = ranges(&d, &[(8, 16, 0), (128, 8, 0)]);
    assert_eq!(d.ask(DISCARD, 0, len), OK);
    let len = ranges(&d, &[(256, 3, 0), (300, 1, 1)]);
    assert_eq!(d.ask(WRITE_ZEROES, 0, len), OK);
    assert_eq!(disk.written().take(), Some(vec![0b111]));
    assert_eq!(BLOCK, 128 * 512);
    let sector = |n: u64| {
        let mut bytes = [0xff; 512];
        file.as_file().read_exact_at(&mut bytes, n * 512).unwrap();
        bytes
    };
    for n in [8, 23, 128, 135, 256, 258, 300] {
        assert_eq!(sector(n), [0; 512], "{n}");
    }
    for n in [7, 24, 127, 136, 255, 259, 299, 301] {
        assert_eq!(sector(n), pattern(n), "{n}");
    }
    for (kind, range, status) in [
        (DISCARD, (0, 1, 1), UNSUPP),
        (DISCARD, (0, 1, 2), UNSUPP),
        (WRITE_ZEROES, (0, 1, 2), UNSUPP),
        (DISCARD, (4095, 2, 0), IOERR),
        (DISCARD, (u64::MAX, 1, 0), IOERR),
        (WRITE_ZEROES, (0, u32::MAX, 0), IOERR),
        (DISCARD, (5, 0, 0), OK),
    ] {
        let len = ranges(&d, &[range]);
        assert_eq!(d.ask(kind, 0, len), status, "{kind} {range:?}");
    }
    // One that is wrong, and nothing is done.
    let len = ranges(&d, &[(0, 1, 0), (5000, 1, 0)]);
    assert_eq!(d.ask(DISCARD, 0, len), IOERR);
    assert_eq!(sector(0), pattern(0));
    let len = ranges(&d, &vec![(0, 1, 0); 33]);
    assert_eq!(d.ask(DISCARD, 0, len), UNSUPP);
    assert_eq!(d.ask(DISCARD, 0, 15), UNSUPP);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = image(8);
    let disk = disk(&file, true);
    let mut d = start(&disk);
    assert_eq!(d.offered() & 1 << 5, 1 << 5);
    d.put(Driver::<Block<Memory>>::buffer(0), &[1; 512]);
    assert_eq!(d.ask(WRITE, 0, 512), IOERR);
    let len = ranges(&d, &[(0, 1, 0)]);
    assert_eq!(d.ask(DISCARD, 0, len), IOERR);
    assert_eq!(d.ask(WRITE_ZEROES, 0, len), IOERR);
    assert_eq!(d.ask(READ, 0, 512), OK);
    assert_eq!(d.get(Driver::<Block<Memory>>::buffer(0), 512), pattern(0));
}

#[test]
fn a_file_that_shrinks_gives_errors_and_does_not_grow_again() {
    let file = image(64);
    let mut d = start(&disk(&file, false));
    file.as_file().set_len(32 * 512).unwrap();
    assert_eq!(d.ask(READ, 31, 512), OK);
    assert_eq!(d.ask(READ, 31, 1024), IOERR);
    assert_eq!(d.ask(WRITE, 40, 512), IOERR);
    let len = ranges(&d, &[(40, 1, 0)]);
    assert_eq!(d.ask(WRITE_ZEROES, 0, len), IOERR);
    assert_eq!(file.as_file().metadata().unwrap().len(), 32 * 512);
    assert_eq!(d.ask(WRITE, 0, 512), OK);
}

#[test]
fn disks_that_cannot_be_are_refused_with_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let error = |path: &std::path::Path| Disk::open(path, false).unwrap_err().to_string();
    let missing = dir.path().join("missing.img");
    assert!(error(&missing).contains("missing.img") && error(&missing).contains("truncate"));
    assert!(
        error(dir.path()).contains("image file"),
        "{}",
        error(dir.path())
    );
    let odd = dir.path().join("odd");
    for len in [0, 1, 513] {
        File::create(&odd).unwrap().set_len(len).unwrap();
        assert!(error(&odd).contains(&format!("{len} bytes")));
    }
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, read_only) in [("/dev/null".as_ref(), false), (pipe.as_path(), true)] {
        assert!(matches!(
            Disk::open(path, read_only),
            Err(DiskError::Kind { .. })
        ));
    }
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let file = image(8);
    let open = |ro| disk(&file, ro);
    let (a, b) = (open(false), open(false));
    a.lock().unwrap();
    a.lock().unwrap();
    let error = b.lock().unwrap_err();
    assert!(matches!(error, DiskError::Locked { .. }));
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(open(true).lock().is_err());
    // Handed over.
    a.unlock().unwrap();
    b.lock().unwrap();
    assert!(a.lock().is_err());
    drop(b);
    let (c, d) = (open(true), open(true));
    c.lock().unwrap();
    d.lock().unwrap();
    assert!(a.lock().is_err());
    drop((c, d));
    a.lock().unwrap();
}

#[test]
fn a_driver_that_does_not_flush_finds_its_writes_on_the_disk() {
    // Only that it works: whether fdatasync was called cannot be seen from here.
    let file = image(64);
    let memory = memory();
    let mut d = Driver::start(
        device(&disk(&file, false), Arc::clone(&memory)),
        memory,
        0,
        8,
    );
    d.put(Driver::<Block<Memory>>::buffer(0), &[9; 512]);
    assert_eq!(d.ask(WRITE, 5, 512), OK);
    let other = OpenOptions::new().read(true).open(file.path()).unwrap();
    let mut bytes = [0; 512];
    other.read_exact_at(&mut bytes, 5 * 512).unwrap();
    assert_eq!(bytes, [9; 512]);
}

#[test]
fn a_reset_in_the_middle_gives_all_memory_back() {
    let file = image(4096);
    let mut d = start(&disk(&file, false));
    for round in 0..50 {
        for n in 0..8 {
            d.request(n, READ, n * 8, 4096);
        }
        d.kick(0);
        if round % 3 == 0 {
            eventually("a request is done", || d.take(0).is_some());
        }
        d.write(0x70, 0);
        assert_eq!(d.status(), 0);
        // After the reset nothing is written any more.
        let at = Driver::<Block<Memory>>::buffer(0);
        d.put(at, &[0x55; 0x8_0000]);
        d.init(u64::MAX, 64);
        assert_eq!(d.ask(READ, 1, 512), OK);
        assert_eq!(d.get(at, 512), pattern(1));
        assert_eq!(d.get(at + 512, 0x8_0000 - 512), vec![0x55; 0x8_0000 - 512]);
    }
}
