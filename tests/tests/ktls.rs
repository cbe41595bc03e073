//! TLS whose records the kernel codes (kTLS), on a kernel that does: Debian's, in a nested host.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{self, IoSlice};
use std::net::{TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use ferry_migration::net::tls::{ClientTls, Credentials, ServerTls};
use ferry_migration::net::{Socket, StreamLink};
use ferry_migration::port::Link;
use ferry_tests::pki::{Authority, Certificates, FAR, HERE};
use ferry_tests::{NestedHost, nested_hosts};

const WORK: &str = "dirty:wss=4M,rate=500";
/// What the kernel counts of connections that it codes (Documentation/networking/tls.rst).
const COUNTERS: &str = "/proc/net/tls_stat";
/// The tests that run in the nested host, of this very program.
const INSIDE: &str = "inside_";

/// Connections whose records this host's kernel has coded since it was started: those that it has
/// sent on, and those that it has received on.
fn coded(host: &NestedHost) -> [u64; 2] {
    let counters = host.run_well(&["/init", "cat", COUNTERS]);
    ["TlsTxSw", "TlsRxSw"].map(|name| {
        let mut lines = counters.lines().map(str::split_ascii_whitespace);
        let line = lines.find_map(|mut words| (words.next() == Some(name)).then_some(words));
        let value = line.and_then(|mut words| words.next());
        value
            .unwrap_or_else(|| panic!("{counters}"))
            .parse()
            .unwrap()
    })
}

fn certificates(host: &NestedHost, authority: &str) -> String {
    host.run_well(&["ferry", "pki", "init", authority]);
    host.run_well(&["ferry", "pki", "host", authority, "here", HERE]);
    format!("{authority}/here")
}

#[test]
fn guests_move_and_each_side_codes_where_it_can() {
    let Some(_turn) = nested_hosts() else { return };
    let host = NestedHost::start_with_program(&std::env::current_exe().unwrap());
    let own = certificates(&host, "/tmp/own");
    let others = certificates(&host, "/tmp/others");

    let mut guest = host.guest(&["--nas", WORK, "--memory", "32M"]);
    guest.goes_on();
    let there = host.receive_with(&["--tls", &others]);
    let refused = guest.command(&["migrate", there.uri(), "--tls", &own]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(refused.stderr.contains("authority"), "{refused:?}");
    drop(there);
    let before = coded(&host);
    for (n, policy) in ["precopy", "postcopy"].into_iter().enumerate() {
        let there = host.receive_with(&["--tls", &own]);
        let options = ["--tls", &own, "--policy", policy, "--verify"];
        let report = guest.migrate(there.uri(), &[&options[..], &["--channels", "2"]].concat());
        eprintln!("{policy}: {:.0} ms, by the kernel", report.total_ms);
        assert_eq!(guest.ends().code, 0);
        guest = there;
        guest.goes_on();
        // Both ends are here: two channels that the source has, and two that the receiver has.
        let channels = 4 * (n as u64 + 1);
        let now = coded(&host);
        for way in 0..2 {
            assert!(now[way] - before[way] >= channels, "{before:?} {now:?}");
        }
    }
    drop(guest);

    let program = std::env::current_exe().unwrap();
    let name = program.file_name().unwrap().to_str().unwrap();
    let command = [name, INSIDE, "--ignored", "--nocapture"];
    let ran = host.run(&[&command[..], &["--test-threads", "1"]].concat());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.contains("2 passed"), "{ran:?}");
}

/// A socket that the kernel may code records on, or must not.
struct Either {
    stream: TcpStream,
    kernel: bool,
}

impl Socket for Either {
    fn set_slice(&mut self, slice: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(slice))?;
        self.stream.set_write_timeout(Some(slice))
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut self.stream, buf)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        io::Write::write_vectored(&mut self.stream, parts)
    }

    fn wait_readable(&mut self, _: Duration) -> io::Result<bool> {
        self.stream.peek(&mut [0]).map(|_| true)
    }

    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        self.kernel.then(|| self.stream.as_fd())
    }
}

type Ended = io::Result<StreamLink<Either>>;

/// Both ends of a connection, after their handshakes: the source's, then the receiver's.
fn shake(source: &Certificates, receiver: &Certificates, kernel: [bool; 2]) -> [Ended; 2] {
    let credentials = |dir: &Path| Credentials::source(dir).unwrap();
    let client = ClientTls::with_credentials(&credentials(source.dir()), HERE).unwrap();
    let credentials = Credentials::receiver(receiver.dir()).unwrap();
    let server = ServerTls::with_credentials(&credentials, &[]).unwrap();
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    let link = |stream, kernel| StreamLink::new(Either { stream, kernel }).unwrap();
    let mut far = link(far, kernel[1]);
    let far = thread::spawn(move || {
        let admitted = far.secure_as_receiver(&server).map_err(io::Error::other);
        admitted.map(|_| far)
    });
    let mut near = link(near, kernel[0]);
    let near = near.secure_as_source(&client, None).map(|()| near);
    [near, far.join().unwrap()]
}

/// Bytes of every size arrive as they were sent, both ways, where the kernel of either end codes
/// them.
#[test]
#[ignore = "runs in the nested host of guests_move_and_each_side_codes_where_it_can"]
fn inside_records_are_the_same_from_both_coders() {
    let own = Authority::default().host_of(&[HERE], FAR);
    for kernel in [[true, true], [true, false], [false, true], [false, false]] {
        let [near, far] = shake(&own, &own, kernel).map(Result::unwrap);
        for (link, kernel) in [(&near, kernel[0]), (&far, kernel[1])] {
            assert!(link.is_secured());
            assert_eq!(link.is_coded_here(), !kernel);
        }
        assert!(near.secret().is_some() && near.secret() == far.secret());
        for (mut from, mut to) in [(near, far)] {
            for bytes in [1_usize, 5, 4096, 16 << 10, (16 << 10) + 1, 1 << 20] {
                let body: Vec<u8> = (0..bytes).map(|n| u8::try_from(n % 251).unwrap()).collect();
                let sent = body.clone();
                let sending = thread::spawn(move || {
                    from.send(&[7; 3], &sent).unwrap();
                    from
                });
                let mut head = [0; 3];
                to.recv(&mut head).unwrap();
                let mut got = vec![0; bytes];
                to.recv(&mut got).unwrap();
                assert!(head == [7; 3] && got == body, "{bytes} bytes, {kernel:?}");
                // And the other way.
                (to, from) = (sending.join().unwrap(), to);
            }
        }
    }
}

/// What the receiver says of a source that it does not trust comes after the source's handshake is
/// done, when its kernel codes already.
#[test]
#[ignore = "runs in the nested host of guests_move_and_each_side_codes_where_it_can"]
fn inside_a_refusal_is_told_through_the_kernel() {
    let authority = Authority::default();
    let receiver = authority.host_of(&[HERE], FAR);
    let stranger = Authority::default().host_of(&[HERE], FAR);
    // It trusts the receiver, but is not trusted.
    let ca = std::fs::read_to_string(receiver.dir().join("ca-cert.pem")).unwrap();
    stranger.put("ca-cert.pem", &ca);
    for kernel in [true, false] {
        let [near, far] = shake(&stranger, &receiver, [kernel, true]);
        let refused = far.map(drop).unwrap_err();
        let why = near.and_then(|mut link| link.recv(&mut [0; 1]));
        let why = why.unwrap_err().to_string();
        eprintln!("the receiver: {refused}; the source: {why}");
        assert!(why.contains("authority"), "{why}");
    }
}
