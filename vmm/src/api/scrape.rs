//! `/metrics` over TCP, for a scraper, and nothing else: what else the control socket does is not
//! to be had from another host.

use super::Control;
use super::http::{Connection, JSON, ReadError, reply};
use super::prometheus::CONTENT_TYPE;
use super::routes::error_body;
use ferry_devices::thread;
use rustix::net::Shutdown;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections at a time; one more is closed.
pub const CONNECTIONS: usize = 8;
/// For a request to arrive, and again for its answer to be read: a scraper's own timeout is 10 s.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long input is thrown away after a refusal.
const LINGER: Duration = Duration::from_millis(200);

/// Where scrapers connect. Bound before the sandbox is entered, served after.
#[derive(Debug)]
pub struct ScrapeListener(TcpListener);

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Scraped {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    listener: TcpListener,
    control: Arc<dyn Control>,
    stop: AtomicBool,
    open: AtomicUsize,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Shared").field(&self.listener).finish()
    }
}

impl ScrapeListener {
    /// Listens there; port 0 takes a free one.
    ///
    /// # Errors
    /// The system's.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).map(Self)
    }

    /// Where it listens, with the port that was chosen.
    ///
    /// # Errors
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Serves what `control` counts.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn serve(self, control: Arc<dyn Control>) -> io::Result<Scraped> {
        let shared = Arc::new(Shared {
            listener: self.0,
            control,
            stop: AtomicBool::new(false),
            open: AtomicUsize::new(0),
        });
        let accepting = Arc::clone(&shared);
        let work = move || {
            accept(&accepting);
            Ok(())
        };
        let failed = |why| tracing::error!("metrics are not served any more: {why}");
        let thread = thread::spawn(thread::Kind::Api, "ferry-metrics", work, failed)?;
        Ok(Scraped {
            shared,
            thread: Some(thread),
        })
    }
}

impl Drop for Scraped {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // It wakes the thread that accepts; an error means that it does not wait.
        let _ = rustix::net::shutdown(&self.shared.listener, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>) {
    loop {
        let accepted = shared.listener.accept();
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        match accepted {
            Ok((stream, _)) => begin(shared, stream),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                // Out of descriptors, most likely; or the peer has left already.
                tracing::warn!("cannot accept a connection of a scraper: {e}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// A place among those that are open.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

fn begin(shared: &Arc<Shared>, stream: TcpStream) {
    // Only this thread counts up.
    if shared.open.load(Ordering::SeqCst) >= CONNECTIONS {
        return;
    }
    shared.open.fetch_add(1, Ordering::SeqCst);
    let place = Place(Arc::clone(shared));
    let work = move || {
        answer(&*place.0.control, Connection::new(stream));
        Ok(())
    };
    let failed = |why| tracing::error!("a scraper has no answer: {why}");
    if let Err(e) = thread::spawn(thread::Kind::Api, "ferry-scrape", work, failed) {
        tracing::warn!("cannot start a thread to answer a scraper: {e}");
    }
}

/// One request, one answer.
fn answer(control: &dyn Control, mut connection: Connection<TcpStream>) {
    let refusal = |status, allow, sentence: &str| {
        let body = error_body(sentence, None);
        reply(status, allow, Some((JSON, &body)), false, false)
    };
    let bytes = match connection.read_head(TIMEOUT, TIMEOUT) {
        Err(ReadError::Ended) => return,
        Err(ReadError::Refused { status, sentence }) => refusal(status, None, &sentence),
        Ok(head) if head.path != "/metrics" => {
            refusal(404, None, "there is nothing here but GET /metrics")
        }
        Ok(head) => match head.method.as_str() {
            "GET" | "HEAD" => {
                let page = control.metrics();
                let body = Some((CONTENT_TYPE, page.as_bytes()));
                reply(200, None, body, head.method == "HEAD", false)
            }
            _ => refusal(405, Some("GET, HEAD"), "/metrics takes GET, HEAD only"),
        },
    };
    if connection.write(&bytes, TIMEOUT).is_ok() {
        connection.close(LINGER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::Vmm;
    use std::io::{Read, Write};

    fn serve() -> (Scraped, SocketAddr) {
        let listener = ScrapeListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        let vmm = Vmm::receiving("tcp:here:1".into()).unwrap();
        (listener.serve(Arc::new(vmm)).unwrap(), address)
    }

    fn say(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        // A hang is a failure, not a wait.
        let long = Some(Duration::from_secs(60));
        stream.set_read_timeout(long).unwrap();
        let _ = stream.write_all(bytes);
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    const ASK: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n";

    #[test]
    fn metrics_are_served_and_nothing_else() {
        let (_scraped, address) = serve();
        let page = say(address, ASK);
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
        assert!(page.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
        assert!(
            page.contains("\nferry_guest_state{state=\"receiving\"} 1\n"),
            "{page}"
        );
        for (request, status) in [
            ("GET /v1/status", "404"),
            ("PUT /v1/stop", "404"),
            ("POST /metrics", "405"),
            ("garbage", "400"),
        ] {
            let text = say(
                address,
                format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes(),
            );
            assert_eq!(text.split(' ').nth(1), Some(status), "{request}: {text}");
        }
        assert!(say(address, &[0xff; 100_000]).starts_with("HTTP/1.1 4"));
        assert!(say(address, ASK).starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn scrapers_that_hang_take_all_places_for_a_while_only() {
        let (scraped, address) = serve();
        let hanging: Vec<_> = (0..3 * CONNECTIONS)
            .map(|_| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(b"GET /met").unwrap();
                stream
            })
            .collect();
        while scraped.shared.open.load(Ordering::SeqCst) < CONNECTIONS {
            std::thread::yield_now();
        }
        assert_eq!(scraped.shared.open.load(Ordering::SeqCst), CONNECTIONS);
        drop(hanging);
        while scraped.shared.open.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        assert!(say(address, ASK).starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn dropping_it_frees_the_port() {
        let (scraped, address) = serve();
        let idle = TcpStream::connect(address).unwrap();
        drop(scraped);
        assert!(TcpStream::connect(address).is_err());
        drop(idle);
    }
}
