//! A small HTTP server, so that the network can be seen to live through a migration: it counts, and
//! echoes.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::machine::uptime_ms;

/// The longest head, and the longest body, in bytes.
const MAX_HEAD: usize = 8 << 10;
const MAX_BODY: usize = 1 << 20;
/// Connections at a time.
const MAX_CONNECTIONS: u64 = 64;

static COUNT: AtomicU64 = AtomicU64::new(0);
static OPEN: AtomicU64 = AtomicU64::new(0);

/// Answers on port 80 for ever.
pub fn serve() {
    let listener = match TcpListener::bind("0.0.0.0:80") {
        Ok(listener) => listener,
        Err(e) => {
            println!("init: nothing can listen on port 80 ({e})");
            return;
        }
    };
    for stream in listener.incoming().flatten() {
        if OPEN.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        std::thread::spawn(move || {
            // A client that breaks off a request knows it.
            let _ = connection(stream, &COUNT);
            OPEN.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Requests, one after the other, until the other side closes.
pub(crate) fn connection(mut stream: TcpStream, counter: &AtomicU64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = Vec::new();
    loop {
        let Some(head) = head(&mut stream, &mut bytes)? else {
            return Ok(());
        };
        let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
        let length = field(&text, "Content-Length").unwrap_or(0);
        if length > MAX_BODY {
            return Err(io::Error::other("a body of more than 1 MiB"));
        }
        while bytes.len() < head + length {
            if more(&mut stream, &mut bytes)? == 0 {
                return Ok(());
            }
        }
        let body = &bytes[head..head + length];
        // The number is counted once per request answered: a doubled or lost request shows.
        let count = counter.fetch_add(1, Ordering::SeqCst) + 1;
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nX-Count: {count}\r\nX-Uptime-Ms: {}\r\nX-Time-Us: {}\r\n\r\n",
            uptime_ms(),
            time_us()
        );
        let mut answer = answer.into_bytes();
        answer.extend(body);
        stream.write_all(&answer)?;
        bytes.drain(..head + length);
    }
}

/// The number in a field of a head.
pub(crate) fn field<T: FromStr>(head: &str, name: &str) -> Option<T> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name)
            .then(|| value.trim().parse().ok())?
    })
}

/// The guest's clock: microseconds since 1970.
fn time_us() -> u128 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |d| d.as_micros())
}

/// Reads until `bytes` begins with a whole head: its length. `None` at the end of the connection.
pub(crate) fn head(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<Option<usize>> {
    loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            return Ok(Some(at + 4));
        }
        if bytes.len() > MAX_HEAD {
            return Err(io::Error::other("a head of more than 8 KiB"));
        }
        if more(stream, bytes)? == 0 {
            return Ok(None);
        }
    }
}

pub(crate) fn more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let n = stream.read(&mut buffer)?;
    bytes.extend(&buffer[..n]);
    Ok(n)
}

/// `init get ADDRESS:PORT PATH`: prints the answer with its head.
pub fn get(address: &str, path: &str) -> Result<(), String> {
    let failed = |e: io::Error| format!("{address} does not answer ({e})");
    let mut stream = TcpStream::connect(address).map_err(failed)?;
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .map_err(failed)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut bytes = Vec::new();
    let head = head(&mut stream, &mut bytes).map_err(failed)?;
    let head = head.ok_or_else(|| format!("{address} closed the connection without an answer"))?;
    print!("{}", String::from_utf8_lossy(&bytes[..head]));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_and_echoes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let thread = std::thread::spawn(move || connection(server, &AtomicU64::new(0)));
        let mut counts = Vec::new();
        for body in ["hello", "", "again"] {
            let request = format!(
                "POST / HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            client.write_all(request.as_bytes()).unwrap();
            let mut bytes = Vec::new();
            let head = head(&mut client, &mut bytes).unwrap().unwrap();
            while bytes.len() < head + body.len() {
                assert!(more(&mut client, &mut bytes).unwrap() > 0);
            }
            assert_eq!(&bytes[head..], body.as_bytes());
            let text = String::from_utf8(bytes).unwrap();
            let count = text
                .lines()
                .find_map(|l| l.strip_prefix("X-Count: "))
                .unwrap();
            counts.push(count.parse::<u64>().unwrap());
        }
        assert_eq!(counts, [1, 2, 3]);
        drop(client);
        thread.join().unwrap().unwrap();
    }
}
