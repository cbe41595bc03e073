//! The threads that read a snapshot's pages while its guest runs.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use ferry_devices::thread;
use ferry_migration::port::PortError;
use ferry_migration::snapshot::{Filling, SnapshotError as FormatError};

use crate::machine::Machine;
use crate::migrate::StreamLink;
use crate::migrate::sink::RamSink;

pub(super) type Pages = Filling<StreamLink, RamSink, File>;

/// A snapshot whose pages are read while its guest runs.
pub(super) struct Reading<'a> {
    pub(super) pages: &'a Arc<Pages>,
    pub(super) machine: &'a Arc<Machine>,
    pub(super) sink: &'a Arc<RamSink>,
    pub(super) path: &'a Path,
}

impl Reading<'_> {
    /// Starts a thread that reads pages.
    pub(super) fn thread(
        &self,
        name: &str,
        work: fn(&Pages) -> Result<(), FormatError>,
    ) -> Result<std::thread::JoinHandle<()>, PortError> {
        let (pages, failed) = (Arc::clone(self.pages), Arc::clone(self.pages));
        let (machine, sink) = (Arc::clone(self.machine), Arc::clone(self.sink));
        let path = self.path.to_owned();
        let work = move || work(&pages).map_err(|error| error.to_string());
        // Who waits for a page, the thread that restores among them, would wait for ever.
        let failure = move |why: String| {
            failed.fail(&why);
            // In this order: it goes on with zeros, straight out of the guest.
            machine.fail(unreadable(&path, &why));
            sink.end_faults();
        };
        Ok(thread::spawn(thread::Kind::Migration, name, work, failure)?)
    }
}

/// Why the guest of the snapshot at `path` was ended.
pub(super) fn unreadable(path: &Path, why: &str) -> String {
    let path = path.display();
    format!("its memory cannot be read from the snapshot {path}: {why}")
}
