use super::*;

/// A socket without a listener, as a VMM that was killed leaves it.
pub(crate) fn leave(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
    // A process that a test beside this one is about to start may hold it for a moment.
    while UnixStream::connect(path).is_ok() {
        std::thread::yield_now();
    }
}

#[test]
fn is_private_and_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let socket = Socket::bind(&path).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    dial(&path, Duration::from_secs(1)).unwrap();
    drop(socket);
    assert!(!path.exists());
}

#[test]
fn a_living_owner_keeps_its_socket_and_a_dead_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let socket = Socket::bind(&path).unwrap();
    let e = Socket::bind(&path).unwrap_err();
    assert!(matches!(e, BindError::InUse { .. }), "{e}");
    assert!(
        dial(&path, Duration::from_secs(1)).is_ok(),
        "the refusal left the owner alone"
    );
    // What a killed VMM leaves: the file, and no listener behind it.
    drop(socket);
    leave(&path);
    assert!(path.exists());
    Socket::bind(&path).unwrap();
}

#[test]
fn of_many_that_find_the_same_dead_socket_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    leave(&path);
    let won: Vec<_> = std::thread::scope(|s| {
        let all: Vec<_> = (0..8).map(|_| s.spawn(|| Socket::bind(&path))).collect();
        all.into_iter()
            .filter_map(|t| t.join().unwrap().ok())
            .collect()
    });
    assert_eq!(won.len(), 1);
    assert!(dial(&path, Duration::from_secs(1)).is_ok());
}

#[test]
fn leaves_other_files_alone_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("precious");
    fs::write(&file, "x").unwrap();
    let e = Socket::bind(&file).unwrap_err().to_string();
    assert!(e.contains("is no socket"), "{e}");
    assert_eq!(fs::read(&file).unwrap(), b"x");

    let e = Socket::bind(&dir.path().join("no/such/s"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("there is no directory"), "{e}");
    let e = Socket::bind(&dir.path().join("x".repeat(120)))
        .unwrap_err()
        .to_string();
    assert!(e.contains("at most 107"), "{e}");
    for odd in ["", "\0abstract", "a\0b"] {
        let e = Socket::bind(Path::new(odd)).unwrap_err().to_string();
        assert!(e.contains("is no path for a socket"), "{odd:?}: {e}");
    }
    let e = Socket::bind(Path::new("/proc/ferry.sock"))
        .unwrap_err()
        .to_string();
    assert!(e.contains("cannot make the socket /proc/ferry.sock"), "{e}");
}

#[test]
fn what_is_no_dead_socket_is_left_alone() {
    use nix::unistd::mkfifo;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "x").unwrap();
    std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
    std::os::unix::fs::symlink(at("nothing"), at("dangling")).unwrap();
    mkfifo(&at("fifo"), Mode::S_IRUSR).unwrap();
    fs::create_dir(at("dir")).unwrap();
    let dead = at("dead");
    leave(&dead);
    std::os::unix::fs::symlink(&dead, at("to-dead")).unwrap();
    // Sockets of living processes that a stream connection does not reach.
    let _datagram = std::os::unix::net::UnixDatagram::bind(at("datagram")).unwrap();
    let quiet = new_socket(SockType::Stream, SockFlag::empty()).unwrap();
    bind(
        quiet.as_raw_fd(),
        &UnixAddr::new(at("quiet").as_path()).unwrap(),
    )
    .unwrap();
    for name in [
        "file", "link", "dangling", "fifo", "dir", "to-dead", "datagram", "quiet",
    ] {
        let before = identity(&at(name)).unwrap();
        let error = Socket::bind(&at(name)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(identity(&at(name)), Some(before), "{name}: {error}");
    }
}

#[test]
fn a_long_path_is_reached_by_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(150));
    fs::create_dir(&deep).unwrap();
    let short = dir.path().join("short");
    std::os::unix::fs::symlink(&deep, &short).unwrap();
    let _socket = Socket::bind(&short.join("s")).unwrap();
    dial(&deep.join("s"), Duration::from_secs(1)).unwrap();
}

#[test]
fn does_not_remove_a_newer_process_s_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let old = Socket::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _new = Socket::bind(&path).unwrap();
    drop(old);
    assert!(dial(&path, Duration::from_secs(1)).is_ok());
}

#[test]
fn does_not_remove_a_file_that_took_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let socket = Socket::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    // Keep the old inode from being reused: the listener is still open.
    fs::write(&path, "another").unwrap();
    drop(socket);
    assert!(path.exists());
}

#[test]
fn connecting_to_a_server_that_never_accepts_is_bounded_and_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let fd = new_socket(SockType::Stream, SockFlag::empty()).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&fd, Backlog::new(0).unwrap()).unwrap();
    // Linux queues one connection more than it was asked to.
    let _queued = dial(&path, Duration::ZERO).unwrap();
    let late = dial(&path, Duration::from_millis(50)).unwrap_err();
    assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    let cancelled = dial_unless(&path, Duration::MAX, &|| true).unwrap_err();
    assert_eq!(cancelled.kind(), io::ErrorKind::Interrupted);
}
