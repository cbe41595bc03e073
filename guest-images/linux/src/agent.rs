//! The agent of a nested host: runs commands for the process that started the machine.
//! [`frames`](crate::frames) has the picture.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::frames::{Kind, read, write};

/// Reports to `where_to` (`ADDRESS:PORT,TOKEN`) until no answer comes from there.
pub(crate) fn serve(where_to: Option<&str>) {
    let Some((address, token)) = where_to.and_then(|text| text.split_once(',')) else {
        println!("init: a host needs ferry.agent=ADDRESS:PORT,TOKEN on its command line");
        return;
    };
    println!("ferry-host: ready t_ms={}", crate::machine::uptime_ms());
    loop {
        match idle(address, token) {
            Ok(Some((stream, arguments))) => {
                std::thread::spawn(move || command(stream, &arguments));
            }
            Ok(None) => return,
            Err(e) => {
                println!("ferry-host: the way to {address} is lost ({e})");
                return;
            }
        }
    }
}

/// Connects and waits for a command; `None` when there will be none.
fn idle(address: &str, token: &str) -> io::Result<Option<(TcpStream, Vec<String>)>> {
    let mut stream = connect(address)?;
    stream.set_nodelay(true)?;
    write(&stream, Kind::Hello, token.as_bytes())?;
    let Some((Kind::Run, arguments)) = read(&mut stream)? else {
        return Ok(None);
    };
    let arguments = arguments
        .split(|b| *b == 0)
        .map(|a| String::from_utf8_lossy(a).into_owned());
    let mut arguments: Vec<String> = arguments.collect();
    // What follows the last NUL.
    arguments.pop();
    Ok(Some((stream, arguments)))
}

/// The network may need a moment after its interface is up.
fn connect(address: &str) -> io::Result<TcpStream> {
    let mut tries = 50;
    loop {
        match TcpStream::connect(address) {
            Err(_) if tries > 0 => tries -= 1,
            done => return done,
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Runs one command to its end.
fn command(stream: TcpStream, arguments: &[String]) {
    let last = match run(&stream, arguments) {
        Ok(code) => write(&stream, Kind::Exit, &code.to_le_bytes()),
        Err(e) => write(
            &stream,
            Kind::Failed,
            format!("{arguments:?} cannot be run: {e}").as_bytes(),
        ),
    };
    // Best effort: it is not waited for.
    let _ = last.and_then(|()| stream.shutdown(Shutdown::Both));
}

fn run(stream: &TcpStream, arguments: &[String]) -> io::Result<i32> {
    let (program, rest) = arguments
        .split_first()
        .ok_or_else(|| io::Error::other("it has no name"))?;
    let mut child = Command::new(program)
        .args(rest)
        .env("PATH", "/bin:/")
        .env("HOME", "/root")
        .env("FERRY_CACHE", "/cache")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let input = child.stdin.take();
    let (output, errors) = (child.stdout.take(), child.stderr.take());
    let child = Arc::new(Mutex::new(child));
    let (feeding, killer) = (stream.try_clone()?, Arc::clone(&child));
    std::thread::spawn(move || feed(feeding, input, &killer));
    // One frame at a time, whichever of the two it is of.
    let out = Mutex::new(stream);
    std::thread::scope(|scope| {
        if let Some(errors) = errors {
            scope.spawn(|| forward(errors, Kind::Errors, &out));
        }
        if let Some(output) = output {
            forward(output, Kind::Output, &out);
        }
    });
    // Both pipes have ended: the process is ending too, or has given them to a child that has
    // ended.
    loop {
        if let Some(status) = lock(&child).try_wait()? {
            return Ok(status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn forward(mut from: impl Read, kind: Kind, to: &Mutex<&TcpStream>) {
    let mut bytes = vec![0; 64 * 1024];
    // After a failure the rest is read all the same, or the command would block.
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        let _ = write(*lock(to), kind, &bytes[..n]);
    }
}

/// Passes input on. The end of the connection is the end of the command.
fn feed(mut stream: TcpStream, mut input: Option<ChildStdin>, child: &Mutex<Child>) {
    loop {
        match read(&mut stream) {
            Ok(Some((Kind::Input, bytes))) => {
                // A command that has closed its input does not want it.
                let _ = input
                    .as_mut()
                    .map(|i| i.write_all(&bytes).and_then(|()| i.flush()));
            }
            Ok(Some((Kind::InputEnd, _))) => drop(input.take()),
            _ => {
                // Gone already is as good.
                let _ = lock(child).kill();
                return;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
