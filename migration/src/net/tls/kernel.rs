//! TLS records that the kernel codes (kTLS, Documentation/networking/tls.rst).
//!
//! rustls shakes hands; from then on the socket itself takes and gives plain bytes, so that pages
//! go between it and guest memory as they do on a connection in clear.

use super::session::sentence;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn,
    TlsGetRecordType, bind, connect, getsockname, recvmsg, setsockopt, socket,
};
use rustls::{AlertDescription, CipherSuite, ConnectionTrafficSecrets, ExtractedSecrets};
use rustls::{Connection, Error, SupportedCipherSuite};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// The most plain bytes of a record (RFC 8446 §5.1).
const RECORD: u64 = 16 << 10;
/// Bytes of an alert: its level, and what it says (RFC 8446 §6).
const ALERT: usize = 2;

/// Makes the socket one that can code records; `false` where the kernel cannot. The socket is then
/// as it was.
pub(in crate::net) fn prepare(socket: BorrowedFd<'_>) -> bool {
    // Once a connection's own keys have left rustls there is no way back.
    codes_in_kernel() && setsockopt(&socket, TcpUlp::default(), b"tls").is_ok()
}

/// Whether this host's kernel codes the TLS records of secured connections (kTLS), so that pages
/// are not copied. It is asked once: a module that is loaded later is for processes that start
/// later. Only a process with CAP_NET_ADMIN has the kernel load it (`modprobe tls`).
pub fn codes_in_kernel() -> bool {
    static WHOLE: OnceLock<bool> = OnceLock::new();
    *WHOLE.get_or_init(|| {
        let tried = try_out();
        if let Err(error) = &tried {
            tracing::debug!(%error, "this process codes TLS records: the kernel does not");
        }
        tried.is_ok()
    })
}

/// Whether the kernel has all of it: not only TLS, but the cipher too.
fn try_out() -> nix::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Tcp,
    )?;
    // Only a connection can have a key. Without listening, a socket can be connected with itself
    // (RFC 9293 §3.5, simultaneous open).
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    let itself: SockaddrIn = getsockname(socket.as_raw_fd())?;
    connect(socket.as_raw_fd(), &itself)?;
    setsockopt(&socket, TcpUlp::default(), b"tls")?;
    let key = TlsCryptoInfo::Aes256Gcm(blank(0));
    setsockopt(&socket, TcpTlsTx, &key)?;
    setsockopt(&socket, TcpTlsRx, &key)
}

/// A connection's parameters, whose next record has this number, without a key.
const fn blank(sequence: u64) -> libc::tls12_crypto_info_aes_gcm_256 {
    libc::tls12_crypto_info_aes_gcm_256 {
        info: libc::tls_crypto_info {
            version: libc::TLS_1_3_VERSION,
            cipher_type: libc::TLS_CIPHER_AES_GCM_256,
        },
        iv: [0; libc::TLS_CIPHER_AES_GCM_256_IV_SIZE],
        key: [0; libc::TLS_CIPHER_AES_GCM_256_KEY_SIZE],
        salt: [0; libc::TLS_CIPHER_AES_GCM_256_SALT_SIZE],
        rec_seq: sequence.to_be_bytes(),
    }
}

/// The records of one connection that the kernel codes.
#[derive(Debug)]
pub(in crate::net) struct KernelRecords {
    /// How many more may be sent with the connection's key.
    left: u64,
}

impl KernelRecords {
    /// Whether a connection, whose handshake is done, can be handed to the kernel.
    pub(super) fn can_take(connection: &Connection) -> bool {
        let suite = connection.negotiated_cipher_suite();
        suite.is_some_and(|suite| suite.suite() == CipherSuite::TLS13_AES_256_GCM_SHA384)
    }

    /// Hands the connection to a [prepared](prepare) socket. None of the peer's bytes may have been
    /// read beyond the handshake.
    ///
    /// # Errors
    /// The connection cannot be used any more.
    pub(super) fn begin(socket: BorrowedFd<'_>, connection: Connection) -> io::Result<Self> {
        let left = match connection.negotiated_cipher_suite() {
            Some(SupportedCipherSuite::Tls13(suite)) => suite.common.confidentiality_limit,
            _ => return Err(untaken(&Errno::EINVAL)),
        };
        let secrets = connection.dangerous_extract_secrets();
        let ExtractedSecrets { tx, rx } = secrets.map_err(io::Error::other)?;
        let refused = |error| untaken(&error);
        setsockopt(&socket, TcpTlsTx, &parameters(tx)?).map_err(refused)?;
        setsockopt(&socket, TcpTlsRx, &parameters(rx)?).map_err(refused)?;
        Ok(Self { left })
    }

    /// Called before so many plain bytes are written to the socket, by one call.
    ///
    /// # Errors
    /// One key must not code more (RFC 8446 §5.5), and Linux before 6.14 cannot change it.
    pub(in crate::net) fn will_send(&mut self, bytes: u64) -> io::Result<()> {
        // A call that ends in the middle of a record ends the record.
        let records = bytes.div_ceil(RECORD) + 1;
        self.left = self.left.checked_sub(records).ok_or_else(|| {
            io::Error::other(
                "a TLS connection has carried what one key may; try with more --channels",
            )
        })?;
        Ok(())
    }
}

fn untaken(error: &Errno) -> io::Error {
    io::Error::other(format!(
        "the kernel has TLS, but does not take this connection's key ({error})"
    ))
}

fn parameters((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> io::Result<TlsCryptoInfo> {
    let ConnectionTrafficSecrets::Aes256Gcm { key, iv } = secrets else {
        return Err(untaken(&Errno::EINVAL));
    };
    let mut info = blank(sequence);
    // Its first bytes are what TLS 1.2 called the salt.
    let (salt, rest) = iv.as_ref().split_at(info.salt.len());
    for (into, from) in [
        (&mut info.salt[..], salt),
        (&mut info.iv[..], rest),
        (&mut info.key[..], key.as_ref()),
    ] {
        if into.len() != from.len() {
            return Err(untaken(&Errno::EINVAL));
        }
        into.copy_from_slice(from);
    }
    Ok(TlsCryptoInfo::Aes256Gcm(info))
}

/// What an error of a connection's socket means: the peer may have said why it ends.
pub(in crate::net) fn explain(socket: BorrowedFd<'_>, error: io::Error) -> io::Error {
    match error.raw_os_error() {
        // Not of the socket: more may be read of it.
        None => return error,
        Some(libc::EBADMSG) => {
            return io::Error::new(
                io::ErrorKind::InvalidData,
                "a TLS record was changed on its way",
            );
        }
        Some(_) => {}
    }
    match alert(socket) {
        Some(alert) => io::Error::new(
            io::ErrorKind::InvalidData,
            sentence(&Error::AlertReceived(alert)),
        ),
        None => error,
    }
}

/// The alert that waits to be read, if that is what comes next: reading it as bytes fails.
fn alert(socket: BorrowedFd<'_>) -> Option<AlertDescription> {
    let mut bytes = [0; ALERT];
    let mut control = nix::cmsg_space!(u8);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let (fd, flags) = (socket.as_fd().as_raw_fd(), MsgFlags::MSG_DONTWAIT);
    let message = recvmsg::<()>(fd, &mut parts, Some(&mut control), flags).ok()?;
    let is_alert = message.cmsgs().ok()?.any(|control| {
        matches!(
            control,
            ControlMessageOwned::TlsGetRecordType(TlsGetRecordType::Alert)
        )
    });
    (is_alert && message.bytes == ALERT).then(|| AlertDescription::from(bytes[1]))
}
