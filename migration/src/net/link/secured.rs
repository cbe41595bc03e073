//! A [`StreamLink`] through TLS.

use super::{Socket, StreamLink, closed};
use crate::net::tls::kernel::{self, KernelRecords};
use crate::net::tls::pki_types::CertificateDer;
use crate::net::tls::{Admission, ClientTls, Secret, ServerTls, TlsError, TlsSession};
use crate::port::Link;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
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

/// A connection whose handshake is done.
pub(super) struct Secured {
    /// What only its two ends know.
    secret: Secret,
    /// The certificate that the peer has shown.
    certificate: Option<CertificateDer<'static>>,
    records: Records,
}

/// What codes the records.
enum Records {
    /// rustls: all bytes go through the session.
    Here(Box<TlsSession>),
    /// The socket.
    Kernel(KernelRecords),
}

impl Secured {
    /// After the handshake; `socket` is one that can code records.
    fn new(session: TlsSession, socket: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        Ok(Self {
            secret: session.secret()?,
            certificate: session.peer_certificate().cloned(),
            records: match socket {
                Some(socket) => Records::Kernel(session.into_kernel(socket)?),
                None => Records::Here(Box::new(session)),
            },
        })
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
            let secured = link.tls.as_ref().ok_or_else(closed)?;
            let admission = Admission::decode(&bytes)
                .ok_or_else(|| refused("its admission is of a later ferry"))?;
            tls.admit(secured.certificate.as_ref(), &admission)
                .map_err(Unsecured::Refused)?;
            Ok(admission)
        })
    }

    /// What only the two ends of this connection know; `None` where it is not secured.
    #[must_use]
    pub fn secret(&self) -> Option<Secret> {
        self.tls.as_ref().map(|secured| secured.secret)
    }

    pub(super) const fn has_session(&self) -> bool {
        match &self.tls {
            Some(secured) => matches!(secured.records, Records::Here(_)),
            None => false,
        }
    }

    fn session(tls: &mut Option<Secured>) -> io::Result<&mut TlsSession> {
        match tls.as_mut().map(|secured| &mut secured.records) {
            Some(Records::Here(session)) => Ok(session),
            _ => Err(closed()),
        }
    }

    pub(super) fn will_send_by_kernel(&mut self, bytes: u64) -> io::Result<()> {
        match self.tls.as_mut().map(|secured| &mut secured.records) {
            Some(Records::Kernel(records)) => records.will_send(bytes),
            _ => Ok(()),
        }
    }

    pub(super) fn explain_by_kernel(&self, error: io::Error) -> io::Error {
        let records = self.tls.as_ref().map(|secured| &secured.records);
        match (records, self.socket.tcp()) {
            (Some(Records::Kernel(_)), Some(socket)) => kernel::explain(socket, error),
            _ => error,
        }
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
        let socket = self.socket.tcp().filter(|_| session.suits_kernel());
        let socket = socket.filter(|socket| kernel::prepare(*socket));
        self.tls = Some(Secured::new(session, socket)?);
        Ok(())
    }

    pub(super) fn send_coded(&mut self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let tls = Self::session(&mut self.tls)?;
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

    pub(super) fn recv_coded(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let tls = Self::session(&mut self.tls)?;
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

    pub(super) fn wait_readable_coded(&mut self, timeout: Duration) -> io::Result<bool> {
        let tls = Self::session(&mut self.tls)?;
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
