//! The threads that watch: one looks for guests, one listens to each, one asks each peer.

use super::scene::{Guest, Scene};
use crate::client::Agent;
use crate::settings::Settings;
use ferry_terminal::names::RuntimeFolder;
use ferry_vmm::api::client::{Client, ClientError};
use ferry_vmm::sync::lock;
use ferry_vmm::thread;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often new guests are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// Guests that are watched: each is a thread and a connection.
const GUESTS: usize = 256;
/// How long a VMM may take to say how its guest is.
const ANSWER: Duration = Duration::from_secs(2);
/// A guest that says nothing any more is asked again after so long.
const AGAIN: Duration = Duration::from_secs(2);
/// Peers that are asked.
pub const PEERS: usize = 64;
/// How often a peer is asked.
const PEER: Duration = Duration::from_secs(5);
/// How long a peer may take to be reached, and to answer.
const PEER_ANSWER: Duration = Duration::from_secs(3);

/// The guests that have a thread.
type Watched = Arc<Mutex<BTreeSet<String>>>;

/// Begins to watch this host's guests and its peers.
///
/// # Errors
/// The system has no threads.
pub fn begin(scene: &Arc<Scene>, settings: &Settings) -> io::Result<()> {
    let failed = |why: String| tracing::warn!("the page shows no news: {why}");
    let shown = Arc::clone(scene);
    thread::spawn(
        thread::Kind::Vmm,
        "ferry-look",
        move || look(&shown),
        failed,
    )?;
    for (at, place) in settings.peers.iter().take(PEERS).enumerate() {
        let (shown, place, tls) = (Arc::clone(scene), place.clone(), settings.tls.clone());
        let ask = move || ask(&shown, at, &place, &tls);
        thread::spawn(thread::Kind::Vmm, "ferry-peer", ask, failed)?;
    }
    Ok(())
}

/// Looks for guests.
fn look(scene: &Arc<Scene>) -> Result<(), String> {
    let folder = RuntimeFolder::find().map_err(|e| e.to_string())?;
    let watched = Watched::default();
    let mut unread = None;
    loop {
        match folder.guests() {
            Ok(mut found) => {
                unread = None;
                let left_out = found.len().saturating_sub(GUESTS);
                found.truncate(GUESTS);
                let is_there = |name: &str| found.iter().any(|(there, _)| there.as_str() == name);
                scene.keep(is_there, left_out);
                for (name, api) in &found {
                    listen(scene, &watched, name.as_str(), api);
                }
            }
            Err(error) => {
                // Once, and not twice a second.
                let why = error.to_string();
                if unread.replace(why.clone()) != Some(why.clone()) {
                    tracing::warn!("{why}");
                }
            }
        }
        // The folder may not exist yet, and inotify reports nothing for a missing one.
        std::thread::sleep(LOOK);
    }
}

/// Has a thread listen to a guest that has none.
fn listen(scene: &Arc<Scene>, watched: &Watched, name: &str, api: &Path) {
    let mut names = lock(watched);
    if names.len() >= GUESTS || !names.insert(name.to_owned()) {
        return;
    }
    drop(names);
    let (shown, guest, api) = (Arc::clone(scene), name.to_owned(), api.to_owned());
    let (all, ended) = (Arc::clone(watched), name.to_owned());
    let work = move || {
        follow(&shown, &guest, &api);
        lock(&all).remove(&guest);
        Ok(())
    };
    let all = Arc::clone(watched);
    let failed = move |why: String| {
        tracing::warn!("the guest {ended} is not watched for a while: {why}");
        lock(&all).remove(&ended);
    };
    if let Err(error) = thread::spawn(thread::Kind::Vmm, "ferry-listen", work, failed) {
        tracing::warn!(%error, "the guest {name} is not watched");
        lock(watched).remove(name);
    }
}

/// Listens to a guest until its VMM says nothing more.
fn follow(scene: &Scene, name: &str, api: &Path) {
    let client = Client::with_timeout(api, ANSWER);
    match client.status() {
        Ok(status) => scene.guest(Guest::of(name, status)),
        Err(ClientError::NoSocket(_)) => return,
        Err(error) => {
            scene.guest(silent(name, &error));
            std::thread::sleep(AGAIN);
            return;
        }
    }
    if let Ok(kept) = client.migrations() {
        scene.kept(name, kept.migrations);
    }
    let ended = client.events(&mut |notice| {
        if scene.receive(name, notice)
            && let Ok(status) = client.status()
        {
            scene.guest(Guest::of(name, status));
        }
    });
    let why = match ended {
        Ok(()) => "the guest's VMM ended before its report".to_owned(),
        Err(error) => error.to_string(),
    };
    scene.silence(name, &why);
    // A VMM that lingers has nothing more to say, and keeps its name.
    std::thread::sleep(AGAIN);
}

/// A guest whose VMM does not answer; as `ferry ps` says it.
fn silent(name: &str, error: &ClientError) -> Guest {
    match error {
        ClientError::NoAnswer { cause, .. } if cause.kind() == io::ErrorKind::ConnectionRefused => {
            let why = format!("its VMM was killed; `ferry run --name {name}` ends this entry");
            Guest::silent(name, "stale", why)
        }
        error => Guest::silent(name, "no-answer", error.to_string()),
    }
}

/// Asks a peer again and again, while a browser looks.
fn ask(scene: &Scene, at: usize, place: &str, tls: &Path) -> Result<(), String> {
    loop {
        if !scene.is_looked_at() {
            // The folder may not exist yet, and inotify reports nothing for a missing one.
            std::thread::sleep(LOOK);
            continue;
        }
        // Its certificates may have been renewed.
        let agent = Agent::new(place, tls, None);
        let answer = agent.and_then(|agent| agent.with_deadline(PEER_ANSWER).host());
        scene.peer(at, answer.map_err(|e| e.to_string()));
        std::thread::sleep(PEER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Host;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// A VMM whose guest begins to move, and which then goes away.
    fn answer(mut stream: UnixStream) {
        let mut head = [0; 4096];
        let n = stream.read(&mut head).unwrap_or(0);
        let asked = String::from_utf8_lossy(&head[..n]).into_owned();
        let body = if asked.starts_with("GET /v1/status ") {
            r#"{"schema":1,"version":"0.1.0","pid":7,"state":"running","explanation":"it runs","uptime_ms":1,
                "guest":{"name":null,"memory_bytes":67108864,"cpus":2},"migration":null,"listening":null}"#
        } else if asked.starts_with("GET /v1/migrations ") {
            r#"{"migrations":[]}"#
        } else {
            "{\"unix_ms\":1,\"event\":\"state\",\"state\":\"migrating\",\"explanation\":\"it moves\",\"to\":\"tcp:b:1\",\"migration\":\"77\"}\n"
        };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = stream.write_all((head + body).as_bytes());
    }

    #[test]
    fn vmms_that_are_silent_killed_or_gone_are_shown_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(format!("{name}.sock"));
        drop(UnixListener::bind(path("dead")).unwrap());
        // A process that a test beside this one is about to start may hold it for a moment.
        while UnixStream::connect(path("dead")).is_ok() {
            std::thread::yield_now();
        }
        // Its queue takes the connection, and no process reads the request.
        let _silent = UnixListener::bind(path("silent")).unwrap();
        let moving = UnixListener::bind(path("moving")).unwrap();
        std::thread::spawn(move || moving.incoming().for_each(|stream| answer(stream.unwrap())));
        let scene = Scene::new(&[]);
        std::thread::scope(|scope| {
            for name in ["dead", "silent", "moving", "none"] {
                let (scene, api) = (&scene, path(name));
                scope.spawn(move || follow(scene, name, &api));
            }
        });
        let overview = serde_json::to_value(scene.overview(Host::default())).unwrap();
        let guests = overview["guests"].as_array().unwrap().iter();
        let states: Vec<_> = guests
            .map(|g| (g["name"].as_str().unwrap(), g["state"].as_str().unwrap()))
            .collect();
        assert_eq!(
            states,
            [
                ("dead", "stale"),
                ("moving", "migrating"),
                ("silent", "no-answer")
            ]
        );
        assert_eq!(overview["guests"][1]["cpus"], 2);
        let lost = scene.migration("77").unwrap();
        assert!(lost.has_ended() && lost.lost.is_some(), "{lost:?}");
        assert_eq!(
            overview["host"]["guests"],
            serde_json::json!(["moving", "silent"])
        );
    }
}
