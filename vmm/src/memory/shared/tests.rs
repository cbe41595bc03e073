use super::*;
use crate::memory::Backing;
use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::unix::fs::MetadataExt;
use vm_memory::{Bytes, GuestAddress};

const BYTES: u64 = 4 << 20;

fn pair() -> (GuestRam, GuestRam) {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    (a, b)
}

fn runs(ram: &GuestRam) -> Result<bool, ClaimError> {
    ram.claim().inspect(|_| ram.begin())
}

#[test]
fn both_sides_see_the_same_memory() {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    let at = GuestAddress(0x3000);
    a.memory().write_obj(1_u64, at).unwrap();
    let blocks = || a.file().metadata().unwrap().blocks();
    let before = blocks();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    assert_eq!(blocks(), before, "taking it over fills no holes");
    assert_eq!(b.memory().read_obj::<u64>(at).unwrap(), 1);
    b.memory().write_obj(2_u64, at).unwrap();
    assert_eq!(a.memory().read_obj::<u64>(at).unwrap(), 2);
    // It lives as long as one of them maps it.
    drop(a);
    assert_eq!(b.memory().read_obj::<u64>(at).unwrap(), 2);
}

/// As `ferry run` makes it: of 2 MiB pages, which no seal protects.
#[test]
fn memory_of_2_mib_pages_is_shared_and_stays_so() {
    let a = GuestRam::new(BYTES, Backing::Auto).unwrap();
    let at = GuestAddress(0x3000);
    a.memory().write_obj(1_u64, at).unwrap();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    assert_eq!(b.backing(), a.backing());
    assert_eq!(b.memory().read_obj::<u64>(at).unwrap(), 1);
    assert!(runs(&a).unwrap());
    assert!(matches!(runs(&b), Err(ClaimError::Held)));
    drop(a);
    assert!(matches!(runs(&b), Err(ClaimError::Stale)));
}

/// What a side hands memory on with that may not open it itself.
#[test]
fn spares_are_of_the_same_memory_and_have_locks_of_their_own() {
    let a = GuestRam::new(BYTES, Backing::Auto).unwrap();
    assert!(runs(&a).unwrap());
    let mut shared = a.share().unwrap();
    if shared.spares.is_empty() {
        return eprintln!("NOT RUN: spares_are_of_the_same_memory: memory is a memfd here");
    }
    shared.spares.push(tempfile::tempfile().unwrap().into());
    let b = GuestRam::adopt(BYTES, false, shared).unwrap();
    let spares = std::mem::take(&mut b.tenure.lock().spares);
    assert_eq!(spares.len(), SharedRam::SPARES);
    let exclusive = |file: &OwnedFd| flock(file, FlockOperation::NonBlockingLockExclusive);
    assert!(spares.iter().all(|spare| exclusive(spare).is_err()));
    a.give_up().unwrap();
    exclusive(&spares[0]).unwrap();
    assert!(exclusive(&spares[1]).is_err());
}

/// Of a user who is neither root nor this one: it could be cut at any time.
#[test]
fn an_unsealed_file_of_another_user_is_refused() {
    let file = match super::super::huge_mount::file(BYTES) {
        Ok(file) => file,
        Err(error) => return eprintln!("NOT RUN: an_unsealed_file_of_another_user: {error}"),
    };
    let shared = |file: &File| SharedRam {
        memory: OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .unwrap()
            .into(),
        word: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        spares: Vec::new(),
    };
    GuestRam::adopt(BYTES, false, shared(&file)).unwrap();
    let another = geteuid().as_raw() + 4711;
    if let Err(error) = std::os::unix::fs::fchown(&file, Some(another), None) {
        return eprintln!("NOT RUN: an_unsealed_file_of_another_user: {error}");
    }
    let error = GuestRam::adopt(BYTES, false, shared(&file)).unwrap_err();
    assert!(matches!(error, ShareError::Unsealed), "{error}");
}

#[test]
fn one_side_at_a_time_runs_the_guest() {
    let (a, b) = pair();
    assert!(runs(&a).unwrap(), "news");
    assert!(!runs(&a).unwrap(), "held already");
    assert!(matches!(runs(&b), Err(ClaimError::Held)));
}

/// The way of a hand-over that works: the source gives it up, the destination takes it, and the
/// source has nothing left.
#[test]
fn after_a_commit_the_destination_runs_the_guest_and_the_source_never_again() {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    runs(&a).unwrap();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    a.give_up().unwrap();
    runs(&b).unwrap();
    assert!(matches!(runs(&a), Err(ClaimError::Held)));
    // Also when the destination is gone: the memory went on without the source's state.
    drop(b);
    assert!(matches!(runs(&a), Err(ClaimError::Stale)));
    assert!(matches!(runs(&a), Err(ClaimError::Stale)), "for good");
}

/// Committed, and the destination died before it ran: the source may.
#[test]
fn an_unread_commit_can_be_taken_back() {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    runs(&a).unwrap();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    a.give_up().unwrap();
    drop(b);
    assert!(runs(&a).unwrap());
}

/// The source resumed its guest and died later: what the destination kept of it is older than the
/// memory.
#[test]
fn a_source_that_went_on_leaves_nothing_to_run() {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    runs(&a).unwrap();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    runs(&a).unwrap();
    assert!(matches!(runs(&b), Err(ClaimError::Held)));
    drop(a);
    assert!(matches!(runs(&b), Err(ClaimError::Stale)));
}

/// The source died in the pause: the kernel has freed its lock, and the memory is as it was.
#[test]
fn a_source_that_died_in_the_pause_leaves_all() {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    runs(&a).unwrap();
    let b = GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    drop(a);
    assert!(runs(&b).unwrap());
}

/// Sharing once more takes the memory back from the process that got it before.
#[test]
fn the_last_who_was_given_it_counts() {
    let a = GuestRam::new(BYTES, Backing::Small).unwrap();
    let give = || GuestRam::adopt(BYTES, false, a.share().unwrap()).unwrap();
    let (b, c) = (give(), give());
    assert!(matches!(runs(&b), Err(ClaimError::Stale)));
    assert!(runs(&c).unwrap());
    assert!(matches!(runs(&a), Err(ClaimError::Held)));
}

fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
    let file = memfd_create("a test's", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn what_is_not_the_guests_memory_is_refused() {
    let word = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let adopt = |memory: OwnedFd, bytes, hugepages| {
        let word = word();
        let error = GuestRam::adopt(
            bytes,
            hugepages,
            SharedRam {
                memory,
                word,
                spares: Vec::new(),
            },
        )
        .unwrap_err();
        let sentence = error.to_string();
        assert!(
            !sentence.contains('\n') && sentence.len() > 20,
            "{sentence}"
        );
        error
    };
    let sealed = SealFlags::SHRINK | SealFlags::GROW;
    let wrong = adopt(memfd(BYTES - 4096, sealed), BYTES, false);
    assert!(matches!(wrong, ShareError::Size { .. }), "{wrong}");
    let wrong = adopt(memfd(BYTES * 2, sealed), BYTES, false);
    assert!(matches!(wrong, ShareError::Size { .. }), "{wrong}");
    let wrong = adopt(memfd(BYTES, SealFlags::GROW), BYTES, false);
    assert!(matches!(wrong, ShareError::Unsealed), "{wrong}");
    for write in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let wrong = adopt(memfd(BYTES, sealed | write), BYTES, false);
        assert!(matches!(wrong, ShareError::ReadOnly), "{wrong}");
    }
    let path = |file: &OwnedFd| format!("/proc/self/fd/{}", file.as_raw_fd());
    let good = memfd(BYTES, sealed);
    let read_only = File::open(path(&good)).unwrap().into();
    let wrong = adopt(read_only, BYTES, false);
    assert!(matches!(wrong, ShareError::ReadOnly), "{wrong}");
    let wrong = adopt(good, BYTES, true);
    assert!(matches!(wrong, ShareError::Pages), "{wrong}");
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(BYTES).unwrap();
    let pipe = rustix::pipe::pipe().unwrap().0;
    let zeros = File::open("/dev/zero").unwrap();
    for other in [on_disk.into(), pipe, zeros.into(), word()] {
        let wrong = adopt(other, BYTES, false);
        assert!(matches!(wrong, ShareError::Kind), "{wrong}");
    }
    let wrong = adopt(memfd(0, sealed), 0, false);
    assert!(matches!(wrong, ShareError::Ram(RamError::Zero)), "{wrong}");
}

/// A word that is no event, from a hostile source, costs it its own guest and stops
/// nothing here.
#[test]
fn a_word_that_is_no_event_stops_nothing() {
    let (read, write) = rustix::pipe::pipe().unwrap();
    for word in [read, write] {
        let memory = memfd(BYTES, SealFlags::SHRINK);
        let ram = GuestRam::adopt(
            BYTES,
            false,
            SharedRam {
                memory,
                word,
                spares: Vec::new(),
            },
        )
        .unwrap();
        // Whatever it comes to, it comes.
        let _ = runs(&ram);
    }
}
