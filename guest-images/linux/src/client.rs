//! A client of the server in `http`, on ONE connection that it never opens again: it shows that a
//! connection survives a migration, that no request is lost, doubled or damaged on the way, and for
//! how long nothing was heard.
//!
//! One request after the other, each with its number and with a body that follows from it; the
//! answer must have that body, and the server's count must have grown by one. So it has to be the
//! server's only client. A byte on stdin asks for a [`Lap`]: what happened since the last one. The
//! end of stdin ends the client.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use crate::content::content;
use crate::http::{field, head, more};

/// Between two requests.
const PAUSE: Duration = Duration::from_millis(5);
/// How long an answer may take until the client calls the connection dead. The machines may be
/// emulated.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest body, in words.
const MAX_WORDS: u64 = 512;
/// The last readings of the guest's clock, of which that with the quickest answer is taken.
const READINGS: usize = 64;

/// What a client saw from one lap to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lap {
    /// Its number, from 1.
    pub number: u64,
    /// Requests that were answered, since the client's start.
    pub answered: u64,
    /// Requests that were made, since the client's start. One more than were answered where one is
    /// under way.
    pub made: u64,
    /// The longest time between two answers in this lap, in microseconds.
    pub gap_us: u64,
    /// The guest's clock less the client's, in microseconds: only how it changes from lap to lap
    /// means something.
    pub clock_us: i64,
    /// How well that is known: half of the time that the quickest of the last answers took, in
    /// microseconds.
    pub clock_error_us: u64,
}

impl std::fmt::Display for Lap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "ferry-client: lap={} answered={} made={} gap_us={} clock_us={} clock_error_us={} end",
            self.number, self.answered, self.made, self.gap_us, self.clock_us, self.clock_error_us
        )
    }
}

impl Lap {
    /// Reads a line that [`Lap`]'s `Display` wrote; `None` if it is not a whole one.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let rest = line.trim().strip_prefix("ferry-client: lap=")?;
        let words: Vec<&str> = rest.strip_suffix(" end")?.split(' ').collect();
        let [number, answered, made, gap, clock, error] = words.as_slice() else {
            return None;
        };
        Some(Self {
            number: number.parse().ok()?,
            answered: answered.strip_prefix("answered=")?.parse().ok()?,
            made: made.strip_prefix("made=")?.parse().ok()?,
            gap_us: gap.strip_prefix("gap_us=")?.parse().ok()?,
            clock_us: clock.strip_prefix("clock_us=")?.parse().ok()?,
            clock_error_us: error.strip_prefix("clock_error_us=")?.parse().ok()?,
        })
    }
}

/// `init client ADDRESS:PORT`.
pub(crate) fn run(address: &str) -> Result<(), String> {
    let stream = TcpStream::connect(address)
        .and_then(|stream| {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
        .map_err(|e| format!("{address} cannot be connected to ({e})"))?;
    println!("ferry-client: connected to {address}");
    let (to, laps) = channel();
    std::thread::spawn(move || {
        for byte in std::io::stdin().lock().bytes() {
            if byte.is_err() || to.send(()).is_err() {
                return;
            }
        }
    });
    requests(stream, &laps, |lap| println!("{lap}"))
}

/// Makes requests until `laps` ends.
fn requests(
    mut stream: TcpStream,
    laps: &Receiver<()>,
    mut tell: impl FnMut(Lap),
) -> Result<(), String> {
    let began = Instant::now();
    let mut clock = Clock::default();
    let mut lap = Lap {
        number: 1,
        ..Lap::default()
    };
    let mut first_count = None;
    let mut last_answer = began;
    loop {
        let number = lap.made;
        lap.made += 1;
        let sent = Instant::now();
        let answer = exchange(&mut stream, number)
            .map_err(|what| format!("LOST: request {number}: {what}; {lap}"))?;
        lap.answered += 1;
        let expected = *first_count.get_or_insert(answer.count) + number;
        if answer.count != expected {
            return Err(format!(
                "LOST: the server counts request {number} as {}, not as {expected}; {lap}",
                answer.count
            ));
        }
        let now = Instant::now();
        lap.gap_us = lap.gap_us.max(micros(now - last_answer));
        last_answer = now;
        clock.reading(sent - began, now - sent, answer.time_us);
        match laps.try_recv() {
            Ok(()) => {
                (lap.clock_us, lap.clock_error_us) = clock.best();
                tell(lap);
                lap.number += 1;
                lap.gap_us = 0;
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
        std::thread::sleep(PAUSE);
    }
}

/// What an answer says beside the body.
struct Answer {
    count: u64,
    time_us: i64,
}

/// One request, and its answer with the right body.
fn exchange(stream: &mut TcpStream, number: u64) -> Result<Answer, String> {
    let body: Vec<u8> = (0..content(number, 1, 0) % MAX_WORDS)
        .flat_map(|word| content(number, 0, word).to_le_bytes())
        .collect();
    let mut request = format!(
        "POST /{number} HTTP/1.1\r\nHost: guest\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend(&body);
    stream
        .write_all(&request)
        .map_err(|e| format!("it cannot be sent ({e})"))?;
    let lost = |e: std::io::Error| format!("it is not answered ({e})");
    let mut bytes = Vec::new();
    let head = head(stream, &mut bytes)
        .map_err(lost)?
        .ok_or("the connection has ended")?;
    while bytes.len() < head + body.len() {
        if more(stream, &mut bytes).map_err(lost)? == 0 {
            return Err("the connection ended in the middle of its answer".to_owned());
        }
    }
    if bytes[head..] != body {
        return Err("its body came back changed".to_owned());
    }
    let text = String::from_utf8_lossy(&bytes[..head]);
    let missing = || "its answer lacks the count or the time".to_owned();
    Ok(Answer {
        count: field(&text, "X-Count").ok_or_else(missing)?,
        time_us: field(&text, "X-Time-Us").ok_or_else(missing)?,
    })
}

/// The guest's clock beside this one: the last readings, each a round trip's time and the
/// difference in its middle.
#[derive(Default)]
struct Clock(std::collections::VecDeque<(u64, i64)>);

impl Clock {
    fn reading(&mut self, sent: Duration, took: Duration, there_us: i64) {
        let middle = i64::try_from(micros(sent + took / 2)).unwrap_or(i64::MAX);
        self.0.truncate(READINGS - 1);
        self.0
            .push_front((micros(took), there_us.saturating_sub(middle)));
    }

    /// The best difference, and how far it can be off.
    fn best(&self) -> (i64, u64) {
        let best = self.0.iter().min_by_key(|(took, _)| *took);
        best.map_or((0, 0), |(took, difference)| (*difference, took / 2))
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_line_is_read_as_it_was_written_and_torn_ones_are_not() {
        let lap = Lap {
            number: 3,
            answered: 100,
            made: 101,
            gap_us: 20_000,
            clock_us: -5,
            clock_error_us: 7,
        };
        let line = lap.to_string();
        assert_eq!(Lap::parse(&line), Some(lap));
        for at in 0..line.len() {
            assert_eq!(Lap::parse(&line[..at]), None, "{at}");
        }
    }

    /// Plays the server by `serve` and the client with three laps; what became of the client.
    fn client_of(serve: impl FnOnce(TcpStream) + Send + 'static) -> Result<Vec<Lap>, String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        let thread = std::thread::spawn(move || serve(server));
        let (to, laps) = channel();
        (0..3).for_each(|_| to.send(()).unwrap());
        drop(to);
        let mut told = Vec::new();
        let done = requests(stream, &laps, |lap| told.push(lap));
        thread.join().unwrap();
        done.map(|()| told)
    }

    #[test]
    fn it_makes_requests_and_tells_of_them_in_laps() {
        let laps = client_of(|stream| {
            let _ = crate::http::connection(stream, &std::sync::atomic::AtomicU64::new(7));
        });
        let laps = laps.unwrap();
        assert_eq!(laps.iter().map(|l| l.number).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(laps[2].answered >= 3 && laps[2].gap_us > 0);
        // Both clocks are this machine's: their difference is the time of the beginning, as well as
        // either lap knows it.
        let known = laps[0].clock_error_us + laps[2].clock_error_us;
        let apart = laps[0].clock_us.abs_diff(laps[2].clock_us);
        assert!(apart <= known + 10_000, "{apart} us, known to {known} us");
    }

    /// Answers one request with a body and a count of its own.
    fn answers(mut stream: TcpStream, change: impl Fn(&mut Vec<u8>), counts: &[u64]) {
        for count in counts {
            let mut bytes = Vec::new();
            let Ok(Some(head)) = head(&mut stream, &mut bytes) else {
                return;
            };
            let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
            let length: usize = field(&text, "content-length").unwrap();
            while bytes.len() < head + length {
                more(&mut stream, &mut bytes).unwrap();
            }
            let mut body = bytes[head..].to_vec();
            change(&mut body);
            let answer = format!("HTTP/1.1 200 OK\r\nX-Count: {count}\r\nX-Time-Us: 1\r\n\r\n");
            stream
                .write_all(&[answer.as_bytes(), &body].concat())
                .unwrap();
        }
    }

    #[test]
    fn what_is_lost_doubled_or_damaged_is_found() {
        let flip = |body: &mut Vec<u8>| {
            let last = body.len() - 1;
            body[last] ^= 1;
        };
        let damaged = client_of(move |s| answers(s, flip, &[1])).unwrap_err();
        assert!(damaged.contains("came back changed"), "{damaged}");
        let doubled = client_of(|s| answers(s, |_| (), &[1, 3])).unwrap_err();
        assert!(doubled.contains("request 1 as 3, not as 2"), "{doubled}");
        let ended = client_of(|s| answers(s, |_| (), &[1])).unwrap_err();
        assert!(ended.contains("LOST: request 1"), "{ended}");
    }
}
