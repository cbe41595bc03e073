//! One connection's TLS: plain bytes in and out over a socket whose calls end by themselves.

use super::kernel::KernelRecords;
use super::{ClientTls, SECRET_BYTES, Secret, ServerTls};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, Connection, ServerConnection};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Coded bytes that may wait in the session: 16 records of 16 KiB, what one call to a socket takes.
const BUFFERED: usize = 256 << 10;
/// Bytes of a record's header: its type, a version, and its length (RFC 8446 §5.1).
const HEADER: usize = 5;
/// The label of the session's secret (RFC 8446 §7.5; ours begins with EXPORTER as RFC 5705 asks).
const LABEL: &[u8] = b"EXPORTER-ferry-session";

/// The state of a secured connection; the socket is handed to each call, and called once at most.
pub struct TlsSession {
    connection: Connection,
    /// Coded bytes off the socket: rustls alone would read 4 KiB with each system call.
    coded: Vec<u8>,
    /// Where in `coded` the bytes are that rustls has not seen.
    unseen: std::ops::Range<usize>,
    /// Where the handshake's next byte is.
    place: Place,
    /// The peer has closed the connection.
    ended: bool,
}

impl std::fmt::Debug for TlsSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsSession").finish_non_exhaustive()
    }
}

/// Where in a record a reader is that must not read beyond the record's end.
#[derive(Debug, Default)]
struct Place {
    header: [u8; HEADER],
    /// Bytes of the header that were read.
    known: usize,
    /// Bytes of the record that follow, once the header is whole.
    rest: usize,
}

impl Place {
    /// Bytes that can be read without reading beyond the record, or beyond its header: not 0.
    const fn left(&self) -> usize {
        match HEADER - self.known {
            0 => self.rest,
            left => left,
        }
    }

    /// After reading no more than what was [left](Self::left).
    fn pass(&mut self, bytes: &[u8]) {
        if self.known < HEADER {
            let known = self.known + bytes.len();
            self.header[self.known..known].copy_from_slice(bytes);
            self.known = known;
            self.rest = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
        } else {
            self.rest -= bytes.len();
        }
        if self.known == HEADER && self.rest == 0 {
            *self = Self::default();
        }
    }
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, sentence(&error))
}

/// What happened, and what to do, for the errors that a user causes.
#[must_use]
pub fn sentence(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    match error {
        Error::InvalidMessage(_) => {
            "the peer does not speak TLS here; give --tls or --pair on both sides".into()
        }
        Error::InvalidCertificate(Bad::Expired | Bad::ExpiredContext { .. }) => {
            "the peer's certificate has expired; make a new one with `ferry pki host`".into()
        }
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "the peer's certificate is of another authority than this host's ca-cert.pem".into()
        }
        Error::InvalidCertificate(Bad::ApplicationVerificationFailure) => {
            "the receiver is not the one that printed the pairing line".into()
        }
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            "the peer's certificate is for another name; connect by a name that it carries, or \
             give that with --tls-authz"
                .into()
        }
        Error::NoCertificatesPresented => {
            "the source shows no certificate; give --tls DIR there".into()
        }
        Error::AlertReceived(Alert::CertificateRequired) => {
            "the receiver wants a certificate; give --tls DIR at the source".into()
        }
        Error::AlertReceived(Alert::CertificateExpired) => {
            "the peer says that this host's certificate has expired; make a new one with \
             `ferry pki host`"
                .into()
        }
        // Authorities of one name: the signature of the certificate does not fit.
        Error::AlertReceived(Alert::UnknownCA | Alert::DecryptError) => {
            "the peer's ca-cert.pem is of another authority than this host's certificate".into()
        }
        Error::AlertReceived(alert) => {
            format!("the peer refused this side's TLS handshake ({alert:?}): see its log")
        }
        other => format!("TLS: {other}"),
    }
}

impl TlsSession {
    /// For a source that has connected.
    ///
    /// # Errors
    /// rustls cannot begin.
    pub fn client(tls: &ClientTls) -> io::Result<Self> {
        let connection = ClientConnection::new(Arc::clone(&tls.config), tls.name.clone());
        Ok(Self::new(connection.map_err(broken)?.into()))
    }

    /// For a receiver that has accepted.
    ///
    /// # Errors
    /// rustls cannot begin.
    pub fn server(tls: &ServerTls) -> io::Result<Self> {
        let connection = ServerConnection::new(Arc::clone(&tls.config));
        Ok(Self::new(connection.map_err(broken)?.into()))
    }

    fn new(mut connection: Connection) -> Self {
        connection.set_buffer_limit(Some(BUFFERED));
        Self {
            connection,
            coded: Vec::new(),
            unseen: 0..0,
            place: Place::default(),
            ended: false,
        }
    }

    /// Hands the connection, whose handshake is done, to a [prepared](super::kernel::prepare)
    /// socket.
    ///
    /// # Errors
    /// The connection cannot be used any more.
    pub(in crate::net) fn into_kernel(self, socket: BorrowedFd<'_>) -> io::Result<KernelRecords> {
        KernelRecords::begin(socket, self.connection)
    }

    /// Whether the kernel could code this connection's records from here on.
    pub(in crate::net) fn suits_kernel(&self) -> bool {
        // Bytes of later records would be lost.
        self.unseen.is_empty() && KernelRecords::can_take(&self.connection)
    }

    /// Takes the handshake a step on: `true` when it is done.
    ///
    /// # Errors
    /// The socket's, and why the peer is not trusted or does not trust this side.
    pub fn handshake(&mut self, socket: &mut (impl Read + Write)) -> io::Result<bool> {
        if self.connection.wants_write() {
            self.push(socket)?;
        } else if self.connection.is_handshaking() {
            self.pull(socket)?;
        }
        Ok(!self.connection.is_handshaking() && !self.connection.wants_write())
    }

    /// The secret of this connection's handshake, known to its two ends only.
    ///
    /// # Errors
    /// The handshake is not done.
    pub fn secret(&self) -> io::Result<Secret> {
        let secret = self
            .connection
            .export_keying_material([0; SECRET_BYTES], LABEL, None);
        secret.map(Secret).map_err(broken)
    }

    /// The certificate that the peer has shown.
    #[must_use]
    pub fn peer_certificate(&self) -> Option<&CertificateDer<'static>> {
        self.connection.peer_certificates()?.first()
    }

    /// Takes plain bytes, as `write_vectored` does, while no coded ones [wait](Self::is_waiting).
    ///
    /// # Errors
    /// The connection has failed before.
    pub fn take(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.connection.writer().write_vectored(parts)
    }

    /// Whether coded bytes wait for the socket.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.connection.wants_write()
    }

    /// Hands coded bytes to the socket.
    ///
    /// # Errors
    /// The socket's, and the bytes wait; where the peer has closed and said why, that.
    pub fn push(&mut self, socket: &mut (impl Read + Write)) -> io::Result<()> {
        use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
        match self.write(socket) {
            Err(error) if !matches!(error.kind(), Interrupted | TimedOut | WouldBlock) => {
                Err(self.last_word(socket).unwrap_or(error))
            }
            done => done,
        }
    }

    fn write(&mut self, socket: &mut impl Write) -> io::Result<()> {
        match self.connection.write_tls(socket)? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            _ => Ok(()),
        }
    }

    /// The alert of a peer that takes no more. A client's handshake is done before the server has
    /// looked at its certificate (RFC 8446 §4.4.2): what it sends then may find the connection
    /// closed, and the reason waiting to be read.
    fn last_word(&mut self, socket: &mut (impl Read + Write)) -> Option<io::Error> {
        while !self.ended {
            if let Err(error) = self.pull(socket) {
                return (error.kind() == io::ErrorKind::InvalidData).then_some(error);
            }
        }
        None
    }

    /// Plain bytes that are here, as `read` does: 0 when the peer has closed, `None` when more
    /// must be [pulled](Self::pull).
    ///
    /// # Errors
    /// The connection has failed before.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.connection.reader().read(buf) {
            Ok(read) => Ok(Some(read)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                // Without TLS's own closing word: an engine's last frame says what an end means.
                io::ErrorKind::UnexpectedEof => Ok(Some(0)),
                _ => Err(error),
            },
        }
    }

    /// Takes coded bytes off the socket, or decodes those that are here.
    ///
    /// # Errors
    /// The socket's, and broken records.
    pub fn pull(&mut self, socket: &mut (impl Read + Write)) -> io::Result<()> {
        if self.unseen.is_empty() {
            self.coded.resize(BUFFERED, 0);
            let handshake = self.connection.is_handshaking();
            let most = if handshake {
                self.place.left()
            } else {
                BUFFERED
            };
            let read = socket.read(&mut self.coded[..most])?;
            if handshake {
                self.place.pass(&self.coded[..read]);
            }
            self.unseen = 0..read;
            self.ended = read == 0;
        }
        if self.ended && self.connection.is_handshaking() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer closed the connection during the TLS handshake: see its log",
            ));
        }
        self.decode(socket)
    }

    fn decode(&mut self, socket: &mut impl Write) -> io::Result<()> {
        let mut coded = &self.coded[self.unseen.clone()];
        self.unseen.start += self.connection.read_tls(&mut coded)?;
        if let Err(error) = self.connection.process_new_packets() {
            // The alert tells the peer why; if it cannot be sent, the error is told here.
            while self.is_waiting() && self.write(socket).is_ok() {}
            return Err(broken(error));
        }
        Ok(())
    }

    /// Whether plain bytes, or the end of the stream, can be read without the socket.
    ///
    /// # Errors
    /// Broken records.
    pub fn has_plain(&mut self, socket: &mut impl Write) -> io::Result<bool> {
        loop {
            let state = self.connection.process_new_packets().map_err(broken)?;
            if state.plaintext_bytes_to_read() > 0 || self.ended {
                return Ok(true);
            }
            if self.unseen.is_empty() {
                return Ok(false);
            }
            self.decode(socket)?;
        }
    }
}
