//! What the page shows: guests, their migrations and the peers, as their watchers last saw them.

use super::View;
use crate::types::Host;
use ferry_migration::report::Event;
use ferry_vmm::api::types::{
    Direction, MigrationRecord, Notice, RecordStatus, StateName, Status, What, unix_ms,
};
use ferry_vmm::sync::lock;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Migrations that are kept; of those that have ended the oldest are dropped.
const MIGRATIONS: usize = 32;
/// After a browser's last question, peers are asked for so long.
const LOOKED_AT: Duration = Duration::from_secs(15);

/// A guest of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// As `ferry ps` says.
    pub state: &'static str,
    /// The state in one sentence.
    pub explanation: String,
    /// Virtual processors, where its VMM has said so.
    pub cpus: Option<u32>,
    /// RAM in bytes, where its VMM has said so.
    pub memory_bytes: Option<u64>,
    /// When its VMM was started, by this host's clock.
    pub since_unix_ms: Option<u64>,
    /// Where a migration goes, or went.
    pub to: Option<String>,
}

impl Guest {
    /// One whose VMM does not answer.
    pub fn silent(name: &str, state: &'static str, explanation: String) -> Self {
        Self {
            name: name.to_owned(),
            state,
            explanation,
            cpus: None,
            memory_bytes: None,
            since_unix_ms: None,
            to: None,
        }
    }

    /// One whose VMM has answered.
    pub fn of(name: &str, status: Status) -> Self {
        let guest = status.guest.as_ref();
        Self {
            name: name.to_owned(),
            state: status.state.name(),
            cpus: guest.map(|guest| guest.cpus),
            memory_bytes: guest.map(|guest| guest.memory_bytes),
            since_unix_ms: Some(unix_ms().saturating_sub(status.uptime_ms)),
            explanation: status.explanation,
            to: status.to,
        }
    }
}

/// A peer of `peers`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// As the settings name it.
    pub place: String,
    /// What its agent said; `null` where it has not answered.
    pub host: Option<Host>,
    /// Why it has not answered.
    pub error: Option<String>,
}

/// A line of the list of migrations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    id: String,
    guest: String,
    status: RecordStatus,
    verified: Option<bool>,
    lost: bool,
    /// Grows with each change.
    version: u64,
}

/// The answer to `GET /v1/overview`.
#[derive(Clone, Debug, Serialize)]
pub struct Overview {
    schema: u32,
    unix_ms: u64,
    host: Host,
    peers: Vec<Peer>,
    guests: Vec<Guest>,
    guests_left_out: usize,
    migrations: Vec<Entry>,
}

#[derive(Debug, Default)]
struct State {
    guests: BTreeMap<String, Guest>,
    left_out: usize,
    /// The newest last, each with its version.
    migrations: VecDeque<(u64, View)>,
    peers: Vec<Peer>,
    changes: u64,
    looked_at: Option<Instant>,
}

/// Shared by the threads that watch and the server.
#[derive(Debug, Default)]
pub struct Scene(Mutex<State>);

impl Scene {
    /// With peers of whom nothing is known yet.
    pub fn new(peers: &[String]) -> Self {
        let peers = peers.iter().map(|place| Peer {
            place: place.clone(),
            ..Peer::default()
        });
        Self(Mutex::new(State {
            peers: peers.collect(),
            ..State::default()
        }))
    }

    /// What a browser asks for first; `host` is this one, without its guests.
    pub fn overview(&self, mut host: Host) -> Overview {
        let mut state = lock(&self.0);
        state.looked_at = Some(Instant::now());
        let there = state.guests.values().filter(|guest| guest.state != "stale");
        host.guests = there.map(|guest| guest.name.clone()).collect();
        let entry = |(version, view): &(u64, View)| Entry {
            id: view.record.id.clone(),
            guest: view.guest.clone().unwrap_or_default(),
            status: view.record.status,
            verified: view
                .record
                .report
                .as_ref()
                .and_then(|report| report.verified),
            lost: view.lost.is_some(),
            version: *version,
        };
        Overview {
            schema: 1,
            unix_ms: unix_ms(),
            host,
            peers: state.peers.clone(),
            guests: state.guests.values().cloned().collect(),
            guests_left_out: state.left_out,
            migrations: state.migrations.iter().map(entry).collect(),
        }
    }

    /// A migration by its ID.
    pub fn migration(&self, id: &str) -> Option<View> {
        let state = lock(&self.0);
        let mut found = state.migrations.iter().rev();
        found
            .find(|(_, view)| view.record.id == id)
            .map(|(_, view)| view.clone())
    }

    /// Whether a browser looks.
    pub fn is_looked_at(&self) -> bool {
        let at = lock(&self.0).looked_at;
        at.is_some_and(|at| at.elapsed() < LOOKED_AT)
    }

    /// What a peer said, or why it did not.
    pub fn peer(&self, at: usize, answer: Result<Host, String>) {
        if let Some(peer) = lock(&self.0).peers.get_mut(at) {
            let (host, error) = match answer {
                Ok(host) => (Some(host), None),
                Err(why) => (None, Some(why)),
            };
            (peer.host, peer.error) = (host, error);
        }
    }

    /// Only these guests are there, and so many more are not watched.
    pub fn keep(&self, is_there: impl Fn(&str) -> bool, left_out: usize) {
        let mut state = lock(&self.0);
        state.guests.retain(|name, _| is_there(name));
        state.left_out = left_out;
    }

    /// How a guest is.
    pub fn guest(&self, guest: Guest) {
        lock(&self.0).guests.insert(guest.name.clone(), guest);
    }

    /// Migrations that a guest's VMM has kept: those from before it was watched.
    pub fn kept(&self, guest: &str, records: Vec<MigrationRecord>) {
        let mut state = lock(&self.0);
        for record in records {
            let known = |(_, view): &(u64, View)| view.record.id == record.id;
            if record.direction == Direction::Outgoing && !state.migrations.iter().any(known) {
                state.add(View::of(Some(guest.to_owned()), record));
            }
        }
    }

    /// What a guest's VMM says. Returns whether the guest's size is not known.
    pub fn receive(&self, guest: &str, notice: &Notice) -> bool {
        let mut state = lock(&self.0);
        match &notice.what {
            What::State {
                state: at,
                explanation,
                to,
                migration,
            } => {
                let row = state.guests.entry(guest.to_owned());
                let row = row.or_insert_with(|| Guest::silent(guest, "", String::new()));
                row.state = at.name();
                row.explanation.clone_from(explanation);
                row.to.clone_from(to);
                let unknown = row.cpus.is_none();
                if let (StateName::Migrating, Some(id)) = (at, migration) {
                    state.view_of(guest, id, to.clone());
                }
                return unknown;
            }
            What::Arrival { explanation, .. } => {
                if let Some(row) = state.guests.get_mut(guest) {
                    row.explanation.clone_from(explanation);
                }
            }
            What::Migration(event) => {
                let id = match event {
                    Event::Progress(progress) => Some(progress.session.as_str()),
                    Event::Report(report) => Some(report.session.as_str()),
                    _ => None,
                };
                if let Some(view) = state.view_for(guest, id) {
                    view.receive(event);
                }
            }
            _ => {}
        }
        false
    }

    /// A guest's VMM says nothing any more: what it had not reported is lost.
    pub fn silence(&self, guest: &str, why: &str) {
        let mut state = lock(&self.0);
        if let Some(view) = state.view_for(guest, None) {
            view.lose(why.to_owned());
        }
    }
}

impl State {
    fn add(&mut self, view: View) {
        if self.migrations.len() >= MIGRATIONS {
            let ended = self
                .migrations
                .iter()
                .position(|(_, view)| view.has_ended());
            self.migrations.remove(ended.unwrap_or(0));
        }
        self.changes += 1;
        self.migrations.push_back((self.changes, view));
    }

    /// The migration of this ID, which begins if it is new.
    fn view_of(&mut self, guest: &str, id: &str, to: Option<String>) {
        if !self.migrations.iter().any(|(_, view)| view.record.id == id) {
            self.add(View::new(Some(guest.to_owned()), id.to_owned(), to));
        }
    }

    /// The migration of a guest, to be changed: that of this ID, or the one under way.
    fn view_for(&mut self, guest: &str, id: Option<&str>) -> Option<&mut View> {
        if let Some(id) = id.filter(|id| !id.is_empty()) {
            let to = self.guests.get(guest).and_then(|row| row.to.clone());
            self.view_of(guest, id, to);
        }
        self.changes += 1;
        let changes = self.changes;
        let fits = |view: &View| match id.filter(|id| !id.is_empty()) {
            Some(id) => view.record.id == id,
            None => view.guest.as_deref() == Some(guest) && !view.has_ended(),
        };
        let mut newest_first = self.migrations.iter_mut().rev();
        let (version, view) = newest_first.find(|(_, view)| fits(view))?;
        *version = changes;
        Some(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Progress, Report, Round, Status as End};

    fn say(scene: &Scene, guest: &str, what: What) {
        scene.receive(guest, &Notice::now(what));
    }

    fn migrating(id: &str) -> What {
        What::State {
            state: StateName::Migrating,
            explanation: "it moves".into(),
            to: Some("tcp:b:1".into()),
            migration: Some(id.into()),
        }
    }

    fn progress(id: &str) -> What {
        What::Migration(Event::Progress(Progress {
            session: id.into(),
            ..Progress::default()
        }))
    }

    fn report(id: &str) -> What {
        let report = Report::bare(id.into(), "auto".into(), End::Failed, "no".into());
        What::Migration(Event::Report(Box::new(report)))
    }

    fn entries(scene: &Scene) -> Vec<Entry> {
        scene.overview(Host::default()).migrations
    }

    #[test]
    fn a_migration_is_followed_from_its_begin_to_its_end() {
        let scene = Scene::new(&[]);
        say(&scene, "web", migrating("1"));
        let begun = entries(&scene);
        assert_eq!((begun.len(), begun[0].status), (1, RecordStatus::UnderWay));
        say(&scene, "web", progress("1"));
        say(
            &scene,
            "web",
            What::Migration(Event::Round(Round::default())),
        );
        // Another guest's is another's.
        say(&scene, "db", migrating("2"));
        say(
            &scene,
            "db",
            What::Migration(Event::Round(Round::default())),
        );
        let view = scene.migration("1").unwrap();
        assert_eq!((view.samples.len(), view.rounds.len()), (1, 1));
        assert_eq!(view.record.to.as_deref(), Some("tcp:b:1"));
        let before = entries(&scene)[0].version;
        say(&scene, "web", report("1"));
        let after = entries(&scene);
        assert_eq!(after[0].status, RecordStatus::Failed);
        assert!(after[0].version > before);
        // Its VMM ends after that, and db's before.
        scene.silence("web", "gone");
        scene.silence("db", "gone");
        let after = entries(&scene);
        assert_eq!((after[0].lost, after[1].lost), (false, true));
        assert_eq!(scene.migration("2").unwrap().lost.unwrap(), "gone");
        assert!(scene.migration("3").is_none());
    }

    #[test]
    fn old_migrations_are_dropped_and_one_under_way_is_not() {
        let scene = Scene::new(&[]);
        say(&scene, "busy", migrating("busy"));
        for n in 0..3 * MIGRATIONS {
            let id = n.to_string();
            say(&scene, "web", migrating(&id));
            say(&scene, "web", report(&id));
        }
        assert_eq!(entries(&scene).len(), MIGRATIONS);
        assert!(scene.migration("busy").is_some() && scene.migration("0").is_none());
        // The VMM has kept some of the same, and one that arrived.
        let newest = scene.migration("95").unwrap().record;
        let arrived = MigrationRecord {
            id: "in".into(),
            direction: Direction::Incoming,
            ..newest.clone()
        };
        scene.kept("web", vec![newest, arrived]);
        assert!(scene.migration("in").is_none());
        assert_eq!(entries(&scene).len(), MIGRATIONS);
    }

    #[test]
    fn guests_and_peers_are_as_they_said_last() {
        let scene = Scene::new(&["b".into(), "c".into()]);
        assert!(!scene.is_looked_at());
        say(&scene, "web", migrating("1"));
        scene.guest(Guest::silent("dead", "stale", "killed".into()));
        scene.peer(1, Err("it is not reached".into()));
        scene.peer(7, Ok(Host::default()));
        let overview = scene.overview(Host::default());
        assert!(scene.is_looked_at());
        assert_eq!(overview.host.guests, ["web"]);
        assert_eq!(overview.guests.len(), 2);
        assert_eq!(overview.guests[1].state, "migrating");
        assert_eq!(
            overview.peers[1].error.as_deref(),
            Some("it is not reached")
        );
        scene.peer(1, Ok(Host::default()));
        scene.keep(|name| name == "dead", 3);
        let overview = scene.overview(Host::default());
        assert_eq!(overview.peers[1].error, None);
        assert_eq!((overview.guests.len(), overview.guests_left_out), (1, 3));
    }
}
