//! A client of the control socket that sends anything at all.

use crate::TIMEOUT;
use ferry_migration::options::Options;
use ferry_migration::report::{Event, Progress};
use ferry_migration::steering::Change;
use ferry_vmm::api::events::{Publisher, Subscription};
use ferry_vmm::api::server::{Limits, Server};
use ferry_vmm::api::types::{
    BalloonRequest, BalloonStatus, Configuration, MigrateRequest, MigrationStatus, Notice,
    RecordRequest, RecoverRequest, SnapshotReport, SnapshotRequest, StateName, Status,
};
use ferry_vmm::api::{Control, Pieces, Refusal};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};

/// The bytes of one connection. Each request is answered, in HTTP, and by no 500: nothing that is
/// asked for here fails, but a panic would. Returns how many answers there were.
pub fn api(bytes: &[u8]) -> usize {
    static SERVER: LazyLock<(tempfile::TempDir, Server)> = LazyLock::new(|| {
        let directory = tempfile::tempdir().unwrap();
        let limits = Limits {
            idle: TIMEOUT,
            request: TIMEOUT,
            reply: TIMEOUT,
            linger: TIMEOUT,
            ..Limits::default()
        };
        let path = directory.path().join("api");
        let server = Server::bind(&path, Arc::new(Willing), limits).unwrap();
        (directory, server)
    });
    let server = &SERVER.1;
    let mut client = UnixStream::connect(server.path()).unwrap();
    server.accept();
    client.set_read_timeout(Some(2 * TIMEOUT)).unwrap();
    // It may have been refused and hung up on before its end. Longer input would need a thread that
    // reads meanwhile.
    let _ = client.write_all(&bytes[..bytes.len().min(64 << 10)]);
    let _ = client.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = client.read_to_end(&mut answer) {
        let hung_up = error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(hung_up, "the server went silent: {error}");
    }
    let text = String::from_utf8_lossy(&answer);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 "), "{text}");
    assert!(
        !text.lines().any(|line| line.starts_with("HTTP/1.1 500")),
        "{text}"
    );
    text.lines()
        .filter(|line| line.starts_with("HTTP/1.1 "))
        .count()
}

/// Does what it is asked to.
struct Willing;

impl Control for Willing {
    fn status(&self) -> Status {
        Status {
            schema: Status::SCHEMA,
            version: "0".into(),
            pid: 1,
            state: StateName::Running,
            explanation: "It runs.".into(),
            guest: None,
            uptime_ms: 1,
            migration: None,
            missing: None,
            balloon: None,
            listening: None,
            serial_output_lost: 0,
            serial: None,
            console_output_lost: 0,
            console: None,
            to: None,
        }
    }
    fn pause(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn resume(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn stop(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn power_button(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn cancel(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn migrate(&self, request: &MigrateRequest) -> Result<Subscription, Refusal> {
        assert_eq!(request.options.check(), Ok(()));
        let mut publisher = Publisher::default();
        let subscription = publisher.subscribe();
        publisher.publish(&Event::Progress(Progress::default()));
        Ok(subscription)
    }
    fn steer(&self, change: &Change) -> Result<(), Refusal> {
        // Sound values or not: the engine's own check decides.
        let _ = change.applied_to(&Options::default()).check();
        Ok(())
    }
    fn migration(&self) -> MigrationStatus {
        MigrationStatus::default()
    }
    fn recover(&self, _: &RecoverRequest) -> Result<(), Refusal> {
        Ok(())
    }
    fn record(&self, request: &RecordRequest) -> Result<Pieces, Refusal> {
        assert_eq!(request.check(), Ok(()));
        Ok(Box::new((0..3).map(|n| vec![n; usize::from(n)])))
    }
    fn configuration(&self) -> Result<Configuration, Refusal> {
        Ok(Configuration::default())
    }
    fn events(&self) -> Result<Subscription<Notice>, Refusal> {
        Ok(Subscription::ended(None))
    }
    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotReport, Refusal> {
        let mut report = SnapshotReport::default();
        report.path.clone_from(&request.path);
        Ok(report)
    }
    fn balloon(&self) -> Result<BalloonStatus, Refusal> {
        Ok(BalloonStatus::default())
    }
    fn set_balloon(&self, request: &BalloonRequest) -> Result<(), Refusal> {
        if let Some(wish) = &request.auto {
            // What it may be asked for, however large.
            let _ = wish.settings(1 << 30);
        }
        Ok(())
    }
}
