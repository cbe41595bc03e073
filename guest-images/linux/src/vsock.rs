//! Both ends of vsock connections, for tests: in a guest those of AF_VSOCK, on a host those of the
//! Unix sockets behind a ferry's vsock device.
//!
//! A server sends back each line that it gets. A client sends a line, waits for it to come back,
//! and then for the connection's end. Both say how it ended: in a guest that was moved by an error.

use std::fmt::Display;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use crate::sys::{VsockListener, vsock_connect};

/// The context of the host (VMADDR_CID_HOST).
const HOST: u32 = 2;

/// `init vsock-serve PORT`, in a guest.
pub fn serve(port: &str) -> Result<(), String> {
    let failed = |e: &dyn Display| format!("port {port} cannot be served ({e})");
    let number = port.parse().map_err(|e| failed(&e))?;
    let listener = VsockListener::bind(number).map_err(|e| failed(&e))?;
    println!("ferry-vsock: serves {port}");
    loop {
        let stream = listener.accept().map_err(|e| failed(&e))?;
        let name = format!("served {port}");
        thread::spawn(move || echo(&stream, &name));
    }
}

/// `init vsock PORT`, in a guest: a program of the host serves it.
pub fn client(port: &str) -> Result<(), String> {
    let failed = |e: &dyn Display| format!("port {port} of the host cannot be reached ({e})");
    let number = port.parse().map_err(|e| failed(&e))?;
    let stream = vsock_connect(HOST, number).map_err(|e| failed(&e))?;
    let answer = ask(&mut BufReader::new(&stream), &stream, "from the guest");
    println!("ferry-vsock: heard {}", answer.map_err(|e| failed(&e))?);
    println!("ferry-vsock: to {port} ended ({})", end(&stream));
    Ok(())
}

/// `init unix-serve PATH`, on a host.
pub fn unix_serve(path: &str) -> Result<(), String> {
    let failed = |e: &dyn Display| format!("{path} cannot be served ({e})");
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|e| failed(&e))?;
    println!("ferry-vsock: serves {path}");
    for stream in listener.incoming() {
        let stream = stream.map_err(|e| failed(&e))?;
        let name = format!("served {path}");
        thread::spawn(move || echo(&stream, &name));
    }
    Ok(())
}

/// `init unix-ask PATH PORT LINE`, on a host: the guest serves the port. With `hold` it waits for
/// the connection's end.
pub fn unix_client(path: &str, port: &str, line: &str, hold: bool) -> Result<(), String> {
    let failed = |e: &dyn Display| format!("port {port} behind {path} cannot be reached ({e})");
    let stream = UnixStream::connect(path).map_err(|e| failed(&e))?;
    let mut reader = BufReader::new(&stream);
    let word = ask(&mut reader, &stream, &format!("CONNECT {port}"));
    let word = word.map_err(|e| failed(&e))?;
    if !word.starts_with("OK ") {
        return Err(failed(&format_args!("it was answered {word:?}")));
    }
    let answer = ask(&mut reader, &stream, line).map_err(|e| failed(&e))?;
    println!("ferry-vsock: heard {answer}");
    if hold {
        println!("ferry-vsock: to {port} ended ({})", end(&stream));
    }
    Ok(())
}

/// Sends a line and returns the next that comes.
fn ask(reader: &mut impl BufRead, mut to: impl Write, line: &str) -> std::io::Result<String> {
    to.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

/// Waits for a connection's end, and says which it was.
fn end(mut stream: impl Read) -> String {
    let mut buffer = [0; 64];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return "in order".into(),
            Ok(_) => {}
            Err(e) => return e.to_string(),
        }
    }
}

fn echo<S>(stream: &S, name: &str)
where
    for<'a> &'a S: Read + Write,
{
    println!("ferry-vsock: {name} accepted");
    let mut to = stream;
    let mut lines = BufReader::new(stream).lines();
    let how = loop {
        match lines.next() {
            Some(Ok(line)) => {
                if let Err(e) = to.write_all(format!("{line}\n").as_bytes()) {
                    break e.to_string();
                }
            }
            Some(Err(e)) => break e.to_string(),
            None => break "in order".into(),
        }
    };
    println!("ferry-vsock: {name} ended ({how})");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_sends_lines_back_and_tells_the_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || echo(&theirs, "test"));
        let answer = ask(&mut BufReader::new(&ours), &ours, "a line").unwrap();
        assert_eq!(answer, "a line");
        ours.shutdown(std::net::Shutdown::Write).unwrap();
        server.join().unwrap();
        assert_eq!(end(&ours), "in order");
    }
}
