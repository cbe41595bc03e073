use super::*;
use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;

/// As a process finds what its parent has left open for it.
fn pass(fd: impl Into<OwnedFd>) -> RawFd {
    let fd = fd.into();
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    fd.into_raw_fd()
}

fn listener(number: RawFd) -> Result<Descriptor, DescriptorError> {
    Passed::Number(number).listener("api")
}

#[test]
fn forms_are_read_back() {
    for text in ["fd:3", "fd:17", "systemd", "systemd:api"] {
        assert_eq!(text.parse::<Passed>().unwrap().to_string(), text);
        assert!(Passed::is_meant(text));
    }
    for text in [
        "",
        "fd:",
        "fd:x",
        "fd:-1",
        "fd:+3",
        "fd:99999999999",
        "systemd:",
        "a",
    ] {
        let error = text.parse::<Passed>().unwrap_err();
        assert!(error.contains("fd:3"), "{error}");
    }
    assert!(!Passed::is_meant("./fd:3") && !Passed::is_meant("a.sock"));
}

#[test]
fn a_descriptor_is_taken_once_and_is_close_on_exec_then() {
    let file = tempfile::tempfile().unwrap();
    let number = pass(file);
    let disk = Descriptor::disk(number, false).unwrap();
    assert_eq!(disk.number(), number);
    let flags = rustix::io::fcntl_getfd(&disk).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    let error = Descriptor::disk(number, false).unwrap_err();
    assert!(matches!(error, DescriptorError::Twice(_)), "{error}");
}

#[test]
fn what_is_not_open_or_is_a_standard_one_is_refused() {
    for number in 0..3 {
        let error = Descriptor::disk(number, true).unwrap_err();
        assert!(matches!(error, DescriptorError::Standard(_)), "{error}");
    }
    for number in [-1, 1 << 20] {
        let error = listener(number).unwrap_err();
        assert!(matches!(error, DescriptorError::Closed(_)), "{error}");
    }
}

#[test]
fn another_kind_is_named_and_left_alone() {
    let (socket, _peer) = UnixStream::pair().unwrap();
    let (socket, null) = (pass(socket), pass(File::open("/dev/null").unwrap()));
    let udp = pass(UdpSocket::bind("127.0.0.1:0").unwrap());
    let said = |error: DescriptorError| error.to_string();
    let cases = [
        (
            said(Descriptor::disk(socket, false).unwrap_err()),
            "a socket, where a regular file",
        ),
        (
            said(Descriptor::tap(socket).unwrap_err()),
            "a socket, where a tap device",
        ),
        (
            said(Descriptor::tap(null).unwrap_err()),
            "another device, where a tap device",
        ),
        (said(listener(socket).unwrap_err()), "does not listen"),
        (said(listener(udp).unwrap_err()), "datagrams"),
        (
            said(listener(null).unwrap_err()),
            "another device, where a stream socket",
        ),
    ];
    for (error, words) in cases {
        assert!(error.contains(words), "{error}");
    }
    // Nothing was closed.
    assert!(matches!(
        listener(socket),
        Err(DescriptorError::Kind { .. })
    ));
    let tcp = pass(TcpListener::bind("127.0.0.1:0").unwrap());
    listener(tcp).unwrap();
}

#[test]
fn a_file_must_be_open_for_what_the_guest_does() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let number = pass(File::open(file.path()).unwrap());
    let error = Descriptor::disk(number, false).unwrap_err().to_string();
    assert!(
        error.contains("reading and writing; open it for both, or add `,ro`"),
        "{error}"
    );
    Descriptor::disk(number, true).unwrap();
    let number = pass(File::options().append(true).open(file.path()).unwrap());
    let error = Descriptor::disk(number, true).unwrap_err().to_string();
    assert!(error.contains("not open for reading;"), "{error}");
}

#[test]
fn systemd_s_sockets_are_found_by_name() {
    let given = |fds: &str, names: Option<&str>| {
        Activation::of(7, |name| match name {
            "LISTEN_PID" => Some("7".into()),
            "LISTEN_FDS" => Some(fds.into()),
            _ => names.map(str::to_owned),
        })
    };
    let two = given("2", Some("receive:api")).unwrap();
    assert_eq!(two.find(None, "api").unwrap(), 4);
    assert_eq!(two.find(Some("receive"), "api").unwrap(), 3);
    let error = two.find(Some("x"), "api").unwrap_err().to_string();
    assert!(error.contains("but receive, api;"), "{error}");
    // The only one needs no name; one that is asked for by a name does.
    let one = given("1", None).unwrap();
    assert_eq!(one.find(None, "api").unwrap(), 3);
    assert!(one.find(Some("api"), "api").is_err());
    let fewer = given("3", Some("a")).unwrap();
    assert_eq!(fewer.0.len(), 3);
    for bad in ["0", "", "x", "-1"] {
        assert!(given(bad, None).is_err(), "{bad:?}");
    }
    // They were for another process.
    let other = Activation::of(8, |name| (name != "LISTEN_FDNAMES").then(|| "7".into()));
    assert!(matches!(other, Err(DescriptorError::NotActivated)));
}
