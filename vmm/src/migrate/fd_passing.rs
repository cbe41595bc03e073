//! Open files beside the bytes of a Unix socket (`SCM_RIGHTS`, unix(7)): how a guest's memory goes
//! to another process, and what its devices have open.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::machine::MAX_DEVICES;
use crate::memory::SharedRam;

/// The memory and its word, and spares.
const MEMORY: usize = 2 + SharedRam::SPARES;
/// The most that can be meant at once: a memory's, or a file for each device.
const FILES: usize = if MEMORY > MAX_DEVICES {
    MEMORY
} else {
    MAX_DEVICES
};

/// What goes, and what came, beside the bytes of a connection.
#[derive(Debug, Default)]
pub(super) struct FdPassing {
    /// To go with the next bytes.
    outgoing: Vec<OwnedFd>,
    /// How many files may come: without any, the kernel closes what comes.
    expected: usize,
    incoming: Vec<OwnedFd>,
    /// More came than can be meant.
    excess: bool,
}

impl FdPassing {
    /// The memory leaves with the next bytes.
    pub(super) fn put(&mut self, memory: SharedRam) {
        self.outgoing = vec![memory.memory, memory.word];
        self.outgoing.extend(memory.spares);
    }

    /// What the guest's devices have open leaves with the next bytes.
    pub(super) fn put_files(&mut self, files: Vec<OwnedFd>) {
        self.outgoing = files;
    }

    /// From now on the files of a memory that come are kept, until [`take`](Self::take).
    pub(super) const fn expect(&mut self) {
        self.expected = MEMORY;
    }

    /// From now on files of devices that come are kept, until [`take_files`](Self::take_files).
    pub(super) const fn expect_files(&mut self) {
        self.expected = MAX_DEVICES;
    }

    /// The files of devices that came. Nothing more is taken in.
    ///
    /// # Errors
    /// There are more than devices; a sentence.
    pub(super) fn take_files(&mut self) -> Result<Vec<OwnedFd>, &'static str> {
        self.expected = 0;
        let files = std::mem::take(&mut self.incoming);
        if std::mem::take(&mut self.excess) {
            return Err("the source has sent more files than a guest can have devices");
        }
        Ok(files)
    }

    /// The memory that came, if any. Nothing more is taken in.
    ///
    /// # Errors
    /// What came cannot be a guest's memory; a sentence.
    pub(super) fn take(&mut self) -> Result<Option<SharedRam>, &'static str> {
        self.expected = 0;
        if std::mem::take(&mut self.excess) {
            self.incoming.clear();
            return Err(
                "the source has sent more files with its handshake than the guest's memory",
            );
        }
        let mut files = self.incoming.drain(..);
        match (files.next(), files.next()) {
            (Some(memory), Some(word)) => Ok(Some(SharedRam {
                memory,
                word,
                spares: files.collect(),
            })),
            (None, _) => Ok(None),
            (Some(_), None) => {
                Err("the source has sent a part only of what makes up the guest's memory")
            }
        }
    }

    pub(super) const fn leaves(&self) -> bool {
        !self.outgoing.is_empty()
    }

    pub(super) const fn expected(&self) -> bool {
        self.expected > 0
    }

    /// Sends bytes, and what is to leave beside the first of them.
    pub(super) fn send(&mut self, socket: &UnixStream, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = self.outgoing.iter().map(AsFd::as_fd).collect();
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(io::Error::other(
                "no room for the guest's files beside the bytes of the connection",
            ));
        }
        let sent = sendmsg(socket, parts, &mut control, SendFlags::NOSIGNAL)?;
        // The files have left with the first byte.
        if sent > 0 {
            self.outgoing.clear();
        }
        Ok(sent)
    }

    /// Receives bytes, and keeps the files that come beside them: as many as can be meant, and no
    /// more.
    pub(super) fn receive(&mut self, socket: &UnixStream, into: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(into)];
        let got = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        // What does not fit was closed by the kernel, what is not kept is closed here.
        self.excess |= got.flags.contains(ReturnFlags::CTRUNC);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                for file in files {
                    if self.incoming.len() < self.expected {
                        self.incoming.push(file);
                    } else {
                        self.excess = true;
                    }
                }
            }
        }
        Ok(got.bytes)
    }
}
