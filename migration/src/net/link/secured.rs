//! A [`StreamLink`] through TLS.

use super::{Socket, StreamLink, closed};
use crate::net::tls::{Admission, ClientTls, Secret, ServerTls, TlsError, TlsSession};
use crate::port::Link;
use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

/// How long a handshake may take: two round trips and the signatures of a busy host.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// What rustls reads and writes.
struct Stream<'a, S>(&'a mut S);

impl<S: Socket> Read for Stream<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl<S: Socket> Write for Stream<'_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a receiver does not take a connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unsecured {
    /// There is no secured connection: nothing can be said on it.
    #[error(transparent)]
    Handshake(#[from] io::Error),
    /// The connection is secured, and may not be a channel: its source can be told why.
    #[error(transparent)]
    Refused(TlsError),
}

impl<S: Socket> StreamLink<S> {
    /// Secures the connection from the source's side: shakes hands, and says why it may be a
    /// channel: `session` is the control channel's secret, for all but the control channel.
    ///
    /// # Errors
    /// The connection is lost, silent or slow; the receiver is not trusted or does not trust.
    pub fn secure_as_source(&mut self, tls: &ClientTls, session: Option<Secret>) -> io::Result<()> {
        self.within_handshake(|link| {
            link.shake_hands(TlsSession::client(tls)?)?;
            link.send(&tls.admission(session).encode(), &[])
        })
    }

    /// Secures the connection from the receiver's side, and learns why it may be a channel. Whether
    /// an [`Admission::Session`] is of the right session is for the caller to compare.
    ///
    /// # Errors
    /// [`Unsecured`]. After [`Unsecured::Refused`] the link can still say why.
    pub fn secure_as_receiver(&mut self, tls: &ServerTls) -> Result<Admission, Unsecured> {
        self.within_handshake(|link| {
            link.shake_hands(TlsSession::server(tls)?)?;
            let mut bytes = [0; Admission::BYTES];
            link.recv(&mut bytes)?;
            let refused = |why| Unsecured::Refused(TlsError::Refused(why));
            let session = link.tls.as_ref().ok_or_else(closed)?;
            let admission = Admission::decode(&bytes)
                .ok_or_else(|| refused("its admission is of a later ferry"))?;
            tls.admit(session, &admission).map_err(Unsecured::Refused)?;
            Ok(admission)
        })
    }

    /// What only the two ends of this connection know; `None` where it is not secured.
    ///
    /// # Errors
    /// rustls has none.
    pub fn secret(&self) -> io::Result<Option<Secret>> {
        self.tls.as_ref().map(|tls| tls.secret()).transpose()
    }

    /// A peer that trickles bytes holds no thread longer than this.
    fn within_handshake<T, E: From<io::Error>>(
        &mut self,
        secure: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, E> {
        self.set_timeout(Some(HANDSHAKE));
        self.set_deadline(Some(HANDSHAKE));
        let done = secure(self);
        self.set_timeout(None);
        self.set_deadline(None);
        done
    }

    pub(in crate::net) fn shake_hands(&mut self, mut session: TlsSession) -> io::Result<()> {
        let mut since = None;
        loop {
            match session.handshake(&mut Stream(&mut self.socket)) {
                Ok(true) => break,
                Ok(false) => {
                    since = None;
                    self.bounds.wait(None).tick(true)?;
                }
                Err(error) => since = self.bounds.wait(since).retry(error)?,
            }
        }
        self.tls = Some(Box::new(session));
        Ok(())
    }

    pub(super) fn send_secured(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let tls = self.tls.as_mut().ok_or_else(closed)?;
        let mut slices = [IoSlice::new(head), IoSlice::new(body)];
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        let mut since = None;
        // Nothing is left in the session: the peer may wait for it.
        while !left.is_empty() || tls.is_waiting() {
            if !tls.is_waiting() {
                let taken = tls.take(left)?;
                IoSlice::advance_slices(&mut left, taken);
            }
            match tls.push(&mut Stream(&mut self.socket)) {
                Ok(()) => {
                    since = None;
                    if !left.is_empty() || tls.is_waiting() {
                        self.bounds.wait(None).tick(true)?;
                    }
                }
                Err(error) => since = self.bounds.wait(since).retry(error)?,
            }
        }
        Ok(())
    }

    pub(super) fn recv_secured(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let tls = self.tls.as_mut().ok_or_else(closed)?;
        let mut since = None;
        let mut done = 0;
        while done < buf.len() {
            match tls.read(&mut buf[done..])? {
                Some(0) => return Err(closed()),
                Some(read) => done += read,
                None => match tls.pull(&mut Stream(&mut self.socket)) {
                    Ok(()) => {
                        since = None;
                        self.bounds.wait(None).tick(true)?;
                    }
                    Err(error) => since = self.bounds.wait(since).retry(error)?,
                },
            }
        }
        Ok(())
    }

    pub(super) fn wait_readable_secured(&mut self, timeout: Duration) -> io::Result<bool> {
        let tls = self.tls.as_mut().ok_or_else(closed)?;
        let until = Instant::now().checked_add(timeout);
        let mut left = Some(timeout);
        loop {
            if tls.has_plain(&mut Stream(&mut self.socket))? {
                return Ok(true);
            }
            // A part of a record is nothing to read yet.
            let Some(wait) = left else {
                return Ok(false);
            };
            if !self.socket.wait_readable(wait)? {
                return Ok(false);
            }
            match tls.pull(&mut Stream(&mut self.socket)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            left = match until {
                Some(until) => until.checked_duration_since(Instant::now()),
                None => Some(timeout),
            };
        }
    }
}
