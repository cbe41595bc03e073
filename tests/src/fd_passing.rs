//! Bytes with open files beside them, from socket to socket.

use ferry_vmm::memory::SharedRam;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The most files that pass at once: more than a memory and its spares, for tests that send too
/// many.
const FILES: usize = SharedRam::SPARES + 16;

/// Sends all bytes, the files with the first of them.
pub(crate) fn pass_on(
    to: impl AsFd,
    mut bytes: &[u8],
    mut files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg(&to, &parts, &mut control, SendFlags::NOSIGNAL)?;
        bytes = &bytes[sent..];
        files = &[];
    }
    Ok(())
}

/// Receives what is there: how many bytes, none at the stream's end, and the files beside them.
pub(crate) fn take_in(from: impl AsFd, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut parts = [IoSliceMut::new(into)];
        match recvmsg(&from, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            got => break got?.bytes,
        }
    };
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    Ok((got, files.flatten().collect()))
}
