//! What a program of the host says first: `CONNECT PORT\n`.

use std::io::ErrorKind;

use rustix::net::{RecvFlags, recv};

use super::poll::Watched;

/// `CONNECT`, a space, 2³²−1, and a new line after a carriage return.
const LONGEST: usize = 20;
/// VMADDR_PORT_ANY (vsock(7)) is no port.
const NO_PORT: u32 = u32::MAX;

/// What it has said.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// Not all of it yet.
    More,
    /// The port that it wants.
    Port(u32),
    /// Something else, or nothing any more.
    Nonsense,
}

/// A program that has not said all of it.
pub struct Hello {
    stream: Watched,
    line: Vec<u8>,
}

impl Hello {
    pub const fn new(stream: Watched) -> Self {
        let line = Vec::new();
        Self { stream, line }
    }

    pub fn into_stream(self) -> Watched {
        self.stream
    }

    /// Reads what has come, and nothing behind the line.
    pub fn read(&mut self) -> Said {
        let mut buffer = [0; LONGEST];
        let room = LONGEST - self.line.len();
        let stream = self.stream.stream();
        let ahead = match recv(stream, &mut buffer[..room], RecvFlags::PEEK) {
            Ok((n, _)) if n > 0 => &buffer[..n],
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Said::More;
            }
            _ => return Said::Nonsense,
        };
        let end = ahead.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(ahead.len(), |at| at + 1);
        match recv(stream, &mut buffer[..taken], RecvFlags::empty()) {
            Ok((n, _)) if n == taken => self.line.extend(&buffer[..taken]),
            _ => return Said::Nonsense,
        }
        match end {
            Some(_) => port(&self.line).map_or(Said::Nonsense, Said::Port),
            None if self.line.len() == LONGEST => Said::Nonsense,
            None => Said::More,
        }
    }
}

/// Of a whole line.
fn port(line: &[u8]) -> Option<u32> {
    let line = str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let line = line.strip_suffix('\r').unwrap_or(line);
    let (word, port) = line.split_once(' ')?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| *port != NO_PORT)?;
    (word.eq_ignore_ascii_case("connect") && digits).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Hello) {
        let (program, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (program, Hello::new(Watched::new(ours, 1)))
    }

    #[test]
    fn a_line_is_a_port_and_what_follows_stays() {
        let (mut program, mut hello) = pair();
        assert_eq!(hello.read(), Said::More);
        program.write_all(b"CONN").unwrap();
        assert_eq!(hello.read(), Said::More);
        program.write_all(b"ECT 52\nCONNECT 53\n").unwrap();
        assert_eq!(hello.read(), Said::Port(52));
        let mut rest = [0; 11];
        let mut stream = hello.into_stream().stream().try_clone().unwrap();
        stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"CONNECT 53\n");
    }

    #[test]
    fn lines_of_every_kind() {
        for (line, wanted) in [
            ("CONNECT 0\n", Some(0)),
            ("connect 4294967294\r\n", Some(u32::MAX - 1)),
            ("CONNECT 4294967295\n", None),
            ("CONNECT 4294967296\n", None),
            ("CONNECT +5\n", None),
            ("CONNECT  5\n", None),
            ("CONNECT\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(port(line.as_bytes()), wanted, "{line:?}");
        }
    }

    #[test]
    fn what_never_ends_and_what_hangs_up_is_refused() {
        let (mut program, mut hello) = pair();
        program.write_all(&[b'C'; 4096]).unwrap();
        assert_eq!(hello.read(), Said::Nonsense);
        let (program, mut hello) = pair();
        drop(program);
        assert_eq!(hello.read(), Said::Nonsense);
    }
}
