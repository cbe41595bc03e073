use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use vm_memory::{Bytes as _, GuestAddress};

mod huge_pages;

use super::*;
use crate::memory::{Backing, PageKind, Pages};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);

/// Empty RAM whose faults are ours, where this user may have that; says loudly if not.
fn registered(bytes: u64) -> Option<Userfault> {
    register(Arc::new(GuestRam::new(bytes, Backing::Small).unwrap()))
}

fn register(ram: Arc<GuestRam>) -> Option<Userfault> {
    register_empty(ram, &[])
}

fn register_empty(ram: Arc<GuestRam>, empty: &[Run]) -> Option<Userfault> {
    match Userfault::register_empty(ram, empty) {
        Ok(userfault) => Some(userfault),
        Err(error @ (UserfaultError::Forbidden { .. } | UserfaultError::Unsupported { .. })) => {
            not_run(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn not_run(why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    eprintln!("NOT RUN: {test}: {why}");
}

/// The contents of page `gfn`, as every test has them.
fn page(gfn: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (i, word) in (0_u64..).zip(bytes.chunks_exact_mut(8)) {
        word.copy_from_slice(&(gfn << 32 | i | 1 << 63).to_le_bytes());
    }
    bytes
}

fn pages(first: u64, count: u64) -> Vec<u8> {
    (first..first + count).flat_map(page).collect()
}

/// The first word of a page, through the mapping.
fn read(ram: &GuestRam, gfn: u64) -> u64 {
    ram.memory()
        .read_obj(GuestAddress(gfn * PAGE_SIZE))
        .unwrap()
}

fn first_word(gfn: u64) -> u64 {
    gfn << 32 | 1 << 63
}

fn fault(userfault: &Userfault) -> Fault {
    match userfault.wait(LONG).unwrap() {
        Waited::Fault(fault) => fault,
        other => panic!("{other:?} instead of a fault"),
    }
}

/// Touches a page in a thread of its own; gives what it read and the thread's ID.
fn reader<'s>(
    scope: &'s Scope<'s, '_>,
    ram: &'s GuestRam,
    gfn: u64,
) -> ScopedJoinHandle<'s, (u64, u32)> {
    scope.spawn(move || (read(ram, gfn), thread_id()))
}

fn thread_id() -> u32 {
    // SAFETY: the call takes nothing and cannot fail.
    u32::try_from(unsafe { libc::gettid() }).unwrap()
}

#[test]
fn a_fault_is_seen_placed_and_read_back() {
    let Some(userfault) = registered(2 * MIB) else {
        return;
    };
    let ram = userfault.ram();
    std::thread::scope(|s| {
        let touch = reader(s, ram, 7);
        let seen = fault(&userfault);
        assert_eq!((seen.gfn, seen.write), (7, false));
        let placed = userfault.place(7, 1, &page(7)).unwrap();
        assert_eq!((placed.placed, placed.present), (1, 0));
        let (word, thread) = touch.join().unwrap();
        assert_eq!((word, Some(thread)), (first_word(7), seen.thread));

        let write = s.spawn(|| ram.memory().write_obj(5_u64, GuestAddress(9 * 4096 + 8)));
        let seen = fault(&userfault);
        assert_eq!((seen.gfn, seen.write), (9, true));
        userfault.place(9, 1, &page(9)).unwrap();
        write.join().unwrap().unwrap();
    });
    let mut bytes = [0; 4096];
    ram.copy_page(7, &mut bytes).unwrap();
    assert_eq!(bytes, page(7));
    let mut want = page(9);
    want[8..16].copy_from_slice(&5_u64.to_le_bytes());
    ram.copy_page(9, &mut bytes).unwrap();
    assert_eq!(bytes, want);
    assert_eq!(userfault.wait(Duration::ZERO).unwrap(), Waited::TimedOut);
}

#[test]
fn a_run_comes_at_once_and_what_is_there_is_kept() {
    let Some(userfault) = registered(2 * MIB) else {
        return;
    };
    let ram = userfault.ram();
    userfault.place(110, 1, &page(1)).unwrap();
    userfault.place(112, 2, &pages(2, 2)).unwrap();
    userfault.place(163, 1, &page(4)).unwrap();
    let placed = userfault.place(100, 64, &pages(100, 64)).unwrap();
    let want = |placed, present| Placed { placed, present };
    assert_eq!(placed, want(60, 4));
    for gfn in 100..164 {
        let kept = [(110, 1), (112, 2), (113, 3), (163, 4)];
        let of = kept.iter().find(|k| k.0 == gfn).map_or(gfn, |k| k.1);
        let mut bytes = [0; 4096];
        ram.copy_page(gfn, &mut bytes).unwrap();
        assert_eq!(bytes, page(of), "page {gfn}");
    }
    assert_eq!(
        userfault.place(100, 64, &pages(1, 64)).unwrap(),
        want(0, 64)
    );
    assert_eq!(ram.unpopulated(0, 512), Some(Run::new(0, 100)));
    assert_eq!(ram.unpopulated(100, 412), Some(Run::new(164, 348)));

    // What the VMM or a splice wrote to the file is there as well, mapped or not.
    let bytes = page(5);
    std::os::unix::fs::FileExt::write_all_at(&**ram.file(), &bytes, 200 * 4096).unwrap();
    assert_eq!(userfault.place(199, 3, &pages(199, 3)).unwrap(), want(2, 1));
    assert_eq!(read(ram, 200), first_word(5));

    assert_eq!(userfault.place(3, 0, &[]).unwrap(), want(0, 0));
    assert!(matches!(
        userfault.place(0, 2, &[0; 4096]),
        Err(PlaceError::Length { .. })
    ));
    assert!(matches!(
        userfault.place(511, 2, &[0; 8192]),
        Err(PlaceError::Range(_))
    ));
    assert!(userfault.place_zero(u64::MAX, 1).is_err());
    let error: io::Error = userfault.place_zero(512, 1).unwrap_err().into();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert!(userfault.wake(512, 1).is_err() && userfault.release(0, 513).is_err());
}

#[test]
fn zeros_are_placed_or_promised() {
    let Some(userfault) = registered(4 * MIB) else {
        return;
    };
    let ram = userfault.ram();
    userfault.place(11, 1, &page(11)).unwrap();
    let want = Placed {
        placed: 3,
        present: 1,
    };
    std::thread::scope(|s| {
        let touch = reader(s, ram, 10);
        assert_eq!(fault(&userfault).gfn, 10);
        assert_eq!(userfault.place_zero(10, 4).unwrap(), want);
        assert_eq!(touch.join().unwrap().0, 0);

        let touch = reader(s, ram, 500);
        assert_eq!(fault(&userfault).gfn, 500);
        userfault.place(501, 1, &page(501)).unwrap();
        userfault.release(400, 200).unwrap();
        assert_eq!(touch.join().unwrap().0, 0);
    });
    assert!(ram.page_is_zero(10).unwrap() && ram.page_is_zero(13).unwrap());
    assert_eq!(read(ram, 11), first_word(11));
    assert_eq!(read(ram, 501), first_word(501));
    // The others are not requested; they cost nothing until they are written to.
    assert_eq!(ram.unpopulated(502, 98), Some(Run::new(502, 98)));
    assert_eq!(read(ram, 450), 0);
    let error = userfault.place(460, 1, &page(460)).unwrap_err();
    assert!(
        matches!(error, PlaceError::Released { gfn: 460 }),
        "{error}"
    );
    // Around them all is as before.
    std::thread::scope(|s| {
        let touch = reader(s, ram, 399);
        assert_eq!(fault(&userfault).gfn, 399);
        userfault.place(399, 1, &page(399)).unwrap();
        assert_eq!(touch.join().unwrap().0, first_word(399));
    });
}

#[test]
fn a_system_call_waits_for_its_pages() {
    let Some(userfault) = registered(2 * MIB) else {
        return;
    };
    let ram = userfault.ram();
    let (from, mut to) = UnixStream::pair().unwrap();
    std::thread::scope(|s| {
        let send = s.spawn(|| {
            ram.write_pages(
                from.as_fd(),
                &[],
                &[Run::new(20, 1), Run::new(30, 2)],
                |_| Ok(()),
            )
        });
        let receive = s.spawn(move || {
            let mut bytes = vec![0; 3 * 4096];
            to.read_exact(&mut bytes).unwrap();
            bytes
        });
        let mut asked = Vec::new();
        while !send.is_finished() && asked.len() < 3 {
            let gfn = fault(&userfault).gfn;
            // The kernel may look twice, in two ways, for one page.
            if !asked.contains(&gfn) {
                asked.push(gfn);
            }
            userfault.place(gfn, 1, &page(gfn)).unwrap();
        }
        send.join().unwrap().unwrap();
        assert_eq!(asked, [20, 30, 31]);
        let want: Vec<u8> = [20, 30, 31].into_iter().flat_map(page).collect();
        assert!(receive.join().unwrap() == want);
    });
}

#[test]
fn dropped_pages_fault_again() {
    let ram = Arc::new(GuestRam::new(2 * MIB, Backing::Small).unwrap());
    for gfn in 40..60 {
        ram.memory()
            .write_slice(&page(1), GuestAddress(gfn * 4096))
            .unwrap();
    }
    ram.clear_all_dirty();
    ram.drop_pages(45, 3).unwrap();
    let mut words = [0];
    ram.or_dirty_words(0, &mut words).unwrap();
    assert_eq!(words, [0], "nothing was written");
    assert!(ram.drop_pages(511, 2).is_err());
    ram.drop_pages(511, 0).unwrap();
    let Some(userfault) = register(ram) else {
        return;
    };
    let ram = userfault.ram();
    std::thread::scope(|s| {
        for gfn in [45, 46, 47] {
            let touch = reader(s, ram, gfn);
            assert_eq!(fault(&userfault).gfn, gfn);
            userfault.place(gfn, 1, &page(gfn)).unwrap();
            assert_eq!(touch.join().unwrap().0, first_word(gfn));
        }
        // Its neighbours never went, and do not fault; dropped now, they do.
        assert_eq!([read(ram, 44), read(ram, 48)], [first_word(1); 2]);
        ram.drop_pages(44, 1).unwrap();
        let touch = reader(s, ram, 44);
        assert_eq!(fault(&userfault).gfn, 44);
        userfault.place(44, 1, &page(44)).unwrap();
        assert_eq!(touch.join().unwrap().0, first_word(44));
    });
}

#[test]
fn a_page_that_came_another_way_needs_a_wake() {
    let Some(userfault) = registered(2 * MIB) else {
        return;
    };
    let ram = userfault.ram();
    std::thread::scope(|s| {
        for (gfn, by_place) in [(3_u64, false), (4, true)] {
            let touch = reader(s, ram, gfn);
            assert_eq!(fault(&userfault).gfn, gfn);
            let file = &**ram.file();
            std::os::unix::fs::FileExt::write_all_at(file, &page(gfn), gfn * 4096).unwrap();
            if by_place {
                // A second copy of the page changes nothing, but finds the sleeper.
                assert_eq!(userfault.place(gfn, 1, &page(0)).unwrap().present, 1);
            } else {
                userfault.wake(gfn, 1).unwrap();
            }
            assert_eq!(touch.join().unwrap().0, first_word(gfn));
        }
        // A wake for nothing: who finds the page absent still is reported again.
        let touch = reader(s, ram, 5);
        assert_eq!(fault(&userfault).gfn, 5);
        userfault.wake(5, 1).unwrap();
        assert_eq!(fault(&userfault).gfn, 5);
        userfault.place(5, 1, &page(5)).unwrap();
        assert_eq!(touch.join().unwrap().0, first_word(5));
    });
}

#[test]
fn the_end_releases_who_waits() {
    let Some(userfault) = registered(2 * MIB) else {
        return;
    };
    let ram = Arc::clone(userfault.ram());
    std::thread::scope(|s| {
        let touch = reader(s, &ram, 8);
        assert_eq!(fault(&userfault).gfn, 8);
        // Another userfaultfd cannot have the memory as long.
        let error = Userfault::register(Arc::clone(&ram)).unwrap_err();
        assert!(matches!(error, UserfaultError::Register { .. }), "{error}");
        drop(userfault);
        assert_eq!(touch.join().unwrap().0, 0);
    });
    assert_eq!(read(&ram, 9), 0);
    let again = Userfault::register(ram).unwrap();
    assert_eq!(again.place_zero(8, 1).unwrap().present, 1);
}

/// Threads of a guest touch all pages in orders of their own, several threads serve, and nothing is
/// lost.
#[test]
fn many_fault_and_many_serve() {
    const PAGES: u64 = 2048;
    const STEPS: [u64; 4] = [1, 2047, 1021, 333];
    let Some(userfault) = registered(PAGES * 4096) else {
        return;
    };
    let ram = userfault.ram();
    let [served, told] = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|s| {
        let servers: Vec<_> = (0..2)
            .map(|_| {
                s.spawn(|| {
                    loop {
                        match userfault.wait(LONG).unwrap() {
                            Waited::Fault(Fault { gfn, .. }) => {
                                // Some neighbours come along, as from a push stream.
                                let count = (PAGES - gfn).min(1 + gfn % 5);
                                let placed = userfault.place(gfn, count, &pages(gfn, count));
                                served.fetch_add(placed.unwrap().placed, Ordering::SeqCst);
                                told.fetch_add(1, Ordering::SeqCst);
                            }
                            Waited::Interrupted => return,
                            Waited::TimedOut => panic!("a guest without an end"),
                        }
                    }
                })
            })
            .collect();
        let guests: Vec<_> = STEPS
            .map(|step| {
                s.spawn(move || {
                    for i in 0..PAGES {
                        let gfn = i * step % PAGES;
                        assert_eq!(read(ram, gfn), first_word(gfn));
                    }
                })
            })
            .into();
        for guest in guests {
            guest.join().unwrap();
        }
        userfault.interrupt().unwrap();
        for server in servers {
            server.join().unwrap();
        }
    });
    assert_eq!(served.load(Ordering::SeqCst), PAGES, "each page came once");
    assert!(told.load(Ordering::SeqCst) > 0);
    assert_eq!(userfault.wait(LONG).unwrap(), Waited::Interrupted);
}

#[test]
fn memory_above_the_hole_faults_by_its_own_numbers() {
    let bytes = (3 << 30) + MIB;
    if super::super::check_available(bytes).is_err() {
        eprintln!("NOT RUN: memory_above_the_hole_faults_by_its_own_numbers: too little memory");
        return;
    }
    let Some(userfault) = registered(bytes) else {
        return;
    };
    let gfn = (4 << 30) / PAGE_SIZE + 5;
    std::thread::scope(|s| {
        let touch = reader(s, userfault.ram(), gfn);
        assert_eq!(fault(&userfault).gfn, gfn);
        userfault.place(gfn, 1, &page(gfn)).unwrap();
        assert_eq!(touch.join().unwrap().0, first_word(gfn));
    });
}

#[test]
fn refusals_say_what_to_do() {
    let errno = io::Error::from_raw_os_error;
    for (error, word) in [
        (UserfaultError::open(errno(libc::EPERM)), "CAP_SYS_PTRACE"),
        (
            UserfaultError::open(errno(libc::ENOSYS)),
            "CONFIG_USERFAULTFD",
        ),
        (
            UserfaultError::open(errno(libc::EMFILE)),
            "Too many open files",
        ),
    ] {
        assert!(error.to_string().contains(word), "{error}");
    }
    let error = PlaceError::kernel(0x123, errno(libc::ENOMEM));
    assert!(
        error
            .to_string()
            .contains("no memory left for guest page 0x123")
    );
    assert_eq!(io::Error::from(error).kind(), io::ErrorKind::OutOfMemory);
}

/// A user without rights, on a host that gives none, is told before anything is sent.
#[test]
fn who_may_not_is_told() {
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    // SAFETY: the call takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root || sysctl.is_ok_and(|s| s.trim() != "0") {
        eprintln!("NOT RUN: who_may_not_is_told: it needs root, and a host that forbids others");
        return;
    }
    std::thread::spawn(|| {
        // Not libc's setresuid, which would change all threads: this thread alone changes its
        // user, and ends.
        let unprivileged = libc::c_long::from(65534);
        // SAFETY: the system call takes integers by value and touches no memory.
        let status = unsafe {
            libc::syscall(
                libc::SYS_setresuid,
                unprivileged,
                unprivileged,
                unprivileged,
            )
        };
        assert_eq!(status, 0);
        match check_userfault() {
            Err(error @ UserfaultError::Forbidden { .. }) => {
                assert!(error.to_string().contains("/dev/userfaultfd"));
            }
            // An administrator has opened the device to all.
            other => assert_eq!(other.unwrap(), UserfaultBy::Device),
        }
    })
    .join()
    .unwrap();
}

/// RAM over a file on a host that has `limit` bytes for it: a tmpfs in a mount namespace of the
/// calling thread's own.
fn ram_on_a_small_host(at: &std::path::Path, bytes: u64, limit: u64) -> io::Result<Arc<GuestRam>> {
    let path = at.to_str().unwrap();
    let [root, tmpfs, path_c, size] =
        ["/", "tmpfs", path, &format!("size={limit}")].map(|s| std::ffi::CString::new(s).unwrap());
    let ok = |status| match status {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let (none, private) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
    // SAFETY: this call takes flags by value; it gives the calling thread a file system view of its
    // own.
    ok(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    // SAFETY: the strings are NUL-terminated and outlive the call; what is null may be for this
    // operation.
    ok(unsafe { libc::mount(none, root.as_ptr(), none, private, none.cast()) })?;
    // SAFETY: as above.
    ok(unsafe {
        let kind = tmpfs.as_ptr();
        libc::mount(kind, path_c.as_ptr(), kind, 0, size.as_ptr().cast())
    })?;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(at.join("ram"))?;
    file.set_len(bytes)?;
    let layout = super::super::RamLayout::new(bytes, false).unwrap();
    Ok(Arc::new(
        GuestRam::map(layout, Arc::new(file), Pages::new(PageKind::Small)).unwrap(),
    ))
}

#[test]
fn a_host_without_memory_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let test = || {
        let ram = match ram_on_a_small_host(directory.path(), MIB, 8 * 4096) {
            Ok(ram) => ram,
            Err(error) => {
                eprintln!("NOT RUN: a_host_without_memory_loses_nothing: no tmpfs: {error}");
                return;
            }
        };
        let Some(userfault) = register(ram) else {
            return;
        };
        let ram = userfault.ram();
        userfault.place(22, 1, &page(1)).unwrap();
        let error = userfault.place(20, 16, &pages(20, 16)).unwrap_err();
        // Eight pages are there: 20 to 27, one of them from before.
        assert!(matches!(error, PlaceError::NoMemory { gfn: 28 }), "{error}");
        let error = userfault.place_zero(28, 1).unwrap_err();
        assert!(matches!(error, PlaceError::NoMemory { gfn: 28 }), "{error}");
        ram.drop_pages(20, 2).unwrap();
        std::thread::scope(|s| {
            let touch = reader(s, ram, 28);
            assert_eq!(fault(&userfault).gfn, 28);
            // Asked for again from the page that is there: it goes on where it ended.
            let placed = userfault.place(22, 8, &pages(22, 8)).unwrap();
            assert_eq!((placed.placed, placed.present), (2, 6));
            assert_eq!(touch.join().unwrap().0, first_word(28));
        });
        assert_eq!(read(ram, 22), first_word(1));
        assert_eq!(read(ram, 27), first_word(27));
    };
    // A thread of its own, since it leaves the others' mount namespace.
    std::thread::scope(|s| s.spawn(test).join().unwrap());
}

/// Prints figures; asserts only what must hold on any machine.
#[test]
fn what_it_costs() {
    const PAGES: u64 = 4096;
    const RUN: u64 = 64;
    let (Some(one), Some(bulk), Some(zero)) = (
        registered(PAGES * 4096),
        registered(PAGES * 4096),
        registered(PAGES * 4096),
    ) else {
        return;
    };
    let contents = pages(0, RUN);
    let mut trips = std::thread::scope(|s| {
        s.spawn(|| {
            while let Waited::Fault(fault) = one.wait(LONG).unwrap() {
                one.place(fault.gfn, 1, &contents[..4096]).unwrap();
            }
        });
        let mut trips = Vec::new();
        for gfn in 0..PAGES {
            let start = Instant::now();
            assert_eq!(read(one.ram(), gfn), first_word(0));
            trips.push(start.elapsed());
        }
        one.interrupt().unwrap();
        trips
    });
    trips.sort();
    let per_page = |start: Instant| start.elapsed().as_secs_f64() * 1e6 / PAGES as f64;
    let start = Instant::now();
    for first in (0..PAGES).step_by(64) {
        assert_eq!(bulk.place(first, RUN, &contents).unwrap().placed, RUN);
    }
    let copy = per_page(start);
    let start = Instant::now();
    assert_eq!(zero.place_zero(0, PAGES).unwrap().placed, PAGES);
    let zeros = per_page(start);
    let start = Instant::now();
    for gfn in (0..PAGES).step_by(2) {
        bulk.ram().drop_pages(gfn, 1).unwrap();
    }
    let drops = per_page(start) * 2.0;
    println!(
        "round trip p50 {:?}, p99 {:?}; runs of {RUN}: {copy:.2} µs a page; zeros: {zeros:.2} µs a page; dropping single pages: {drops:.2} µs each",
        trips[trips.len() / 2],
        trips[trips.len() * 99 / 100],
    );
}
