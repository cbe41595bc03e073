//! The agent's server: HTTP over TLS, a request at a time for each connection.

use crate::commands::{self, output};
use crate::settings::Settings;
use crate::types::{Host, Receiver, Wanted};
use crate::{accept, page, preflight, receivers};
use axum::extract::{DefaultBodyLimit, Extension, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use ferry_migration::net::tls::{Credentials, ServerTls, TlsError};
use ferry_terminal::names::GuestName;
use ferry_vmm::api::types::ErrorBody;
use ferry_vmm::memory::available_memory;
use ferry_vmm::numa::HostNodes;
use ferry_vmm::sync::lock;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

/// Connections at a time; further ones wait for their turn.
const CONNECTIONS: usize = 64;
/// How long a handshake, and each request's head, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a refused client may take to read why.
const LAST_WORD: Duration = Duration::from_secs(1);
/// How long a connection may last.
const LONGEST: Duration = Duration::from_secs(120);
/// The largest request.
const BODY: usize = 64 << 10;

/// Why the agent does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Its certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its place.
    #[error("the agent cannot listen on {address} ({cause})")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        cause: io::Error,
    },
    /// The page's place.
    #[error(
        "the page is not served on {0}, where other machines could reach it: give a loopback address, such as 127.0.0.1:7008, \
         and reach it from elsewhere by ssh -L"
    )]
    PageNotLoopback(SocketAddr),
    /// The system.
    #[error("the agent cannot serve ({0})")]
    Io(#[from] io::Error),
}

/// What the requests share.
struct Shared {
    settings: Settings,
    /// Held while a guest is checked and its receiver started: two requests for one name, or for
    /// the last memory, come one after the other.
    starting: Mutex<()>,
}

/// Where an agent listens.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Listening {
    /// For other hosts.
    pub agent: SocketAddr,
    /// For browsers of this host, where there is a page.
    pub page: Option<String>,
}

/// Serves until the process ends; calls `listening` with the address.
///
/// # Errors
/// [`ServeError`].
pub fn serve(settings: Settings, listening: impl FnOnce(&Listening)) -> Result<(), ServeError> {
    let credentials = Credentials::receiver(&settings.tls)?;
    let tls = ServerTls::with_credentials(&credentials, &settings.tls_authz)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    runtime.block_on(async {
        let address = settings.listen;
        let page = page::server::listen(&settings).await?;
        let listener = TcpListener::bind(address);
        let listener = listener
            .await
            .map_err(|cause| ServeError::Listen { address, cause })?;
        let mut places = Listening {
            agent: listener.local_addr()?,
            page: None,
        };
        if let Some((listener, router)) = page {
            places.page = Some(page::server::url(listener.local_addr()?));
            tokio::spawn(page::server::serve_each(listener, router));
        }
        listening(&places);
        let shared = Arc::new(Shared {
            settings,
            starting: Mutex::new(()),
        });
        serve_each(listener, tls, shared).await
    })
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/guests", get(guests))
        .route("/v1/guests/{name}/start", put(start_guest))
        .route("/v1/guests/{name}/stop", put(stop_guest))
        .route("/v1/doctor", get(doctor))
        .route("/v1/receivers", post(receive))
        .route("/v1/receivers/{name}", delete(end_receiver))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(shared)
}

async fn serve_each(
    listener: TcpListener,
    tls: ServerTls,
    shared: Arc<Shared>,
) -> Result<(), ServeError> {
    let acceptor = TlsAcceptor::from(tls.config());
    let router = router(shared);
    accept::each(listener, (CONNECTIONS, "a"), |stream, peer| {
        let (acceptor, tls, router) = (acceptor.clone(), tls.clone(), router.clone());
        async move {
            let served = timeout(LONGEST, connection(stream, &acceptor, &tls, router)).await;
            if let Ok(Err(why)) = served {
                tracing::info!(%peer, "a connection was refused: {why}");
            }
        }
    })
    .await;
    Ok(())
}

/// Serves one connection.
async fn connection(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    tls: &ServerTls,
    router: Router,
) -> Result<(), String> {
    let here = stream.local_addr().map_err(|e| e.to_string())?.ip();
    let secured = timeout(PATIENCE, acceptor.accept(stream).into_fallible()).await;
    let secured = match secured.map_err(|_| "it says nothing")? {
        Ok(secured) => secured,
        Err((error, stream)) => {
            // Closing with its request unread would take the alert away.
            let _ = timeout(LAST_WORD, unread(stream)).await;
            return Err(error.to_string());
        }
    };
    let certificates = secured.get_ref().1.peer_certificates().unwrap_or_default();
    let refusal = tls.permits(certificates.first()).err();
    let router = match &refusal {
        None => router.layer(Extension(here)),
        Some(why) => {
            let why = why.to_string();
            Router::new().fallback(|| async { Failure(StatusCode::FORBIDDEN, why) })
        }
    };
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(refusal.is_none())
        .serve_connection(TokioIo::new(secured), TowerToHyperService::new(router))
        .await
        .map_err(|e| e.to_string())?;
    refusal.map_or(Ok(()), |why| Err(why.to_string()))
}

/// Reads what a client says that has been refused, until it closes.
async fn unread(stream: TcpStream) -> io::Result<()> {
    loop {
        stream.readable().await?;
        match stream.try_read(&mut [0; 4096]) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
}

/// Why a request is not served.
struct Failure(StatusCode, String);

impl Failure {
    fn conflict(why: impl Into<String>) -> Self {
        Self(StatusCode::CONFLICT, why.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: self.1,
            code: None,
        };
        (self.0, Json(body)).into_response()
    }
}

/// Commands take their time: they run beside the server.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        let why = format!("the agent has failed ({error})");
        Err(Failure(StatusCode::INTERNAL_SERVER_ERROR, why))
    })
}

/// What this host calls itself.
pub(crate) fn host_name() -> String {
    let host = rustix::system::uname();
    host.nodename().to_string_lossy().into_owned()
}

/// What this host has, with these guests.
pub(crate) fn this_host(guests: Vec<String>) -> Host {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Host {
        schema: 2,
        name: host_name(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        processors: u32::try_from(processors).unwrap_or(u32::MAX),
        memory_available_bytes: available_memory().unwrap_or(0),
        numa_nodes: HostNodes::read().with_memory(),
        guests,
    }
}

async fn host() -> Result<Json<Host>, Failure> {
    beside(|| {
        let (guests, _) = commands::guests().map_err(Failure::conflict)?;
        let there = guests.into_iter().filter(|guest| guest.state != "stale");
        Ok(Json(this_host(there.map(|guest| guest.name).collect())))
    })
    .await
}

/// What runs here, as `ferry ps --json` says, and the guest files that there are.
async fn guests(State(shared): State<Arc<Shared>>) -> Result<Json<serde_json::Value>, Failure> {
    beside(move || {
        let (_, mut list) = commands::guests().map_err(Failure::conflict)?;
        let mut files: Vec<String> = std::fs::read_dir(&shared.settings.guests)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|file| Some(file.strip_suffix(".toml")?.to_owned()))
            .filter(|name| name.parse::<GuestName>().is_ok())
            .collect();
        files.sort_unstable();
        list["files"] = files.into();
        Ok(Json(list))
    })
    .await
}

async fn doctor() -> Result<Json<serde_json::Value>, Failure> {
    beside(|| {
        let printed = output(&["doctor", "--json"]).map_err(Failure::conflict)?;
        let value = serde_json::from_slice(&printed);
        value
            .map(Json)
            .map_err(|e| Failure::conflict(e.to_string()))
    })
    .await
}

fn named(name: &str) -> Result<GuestName, Failure> {
    name.parse()
        .map_err(|why| Failure(StatusCode::BAD_REQUEST, why))
}

/// Starts the guest of a file.
async fn start_guest(
    State(shared): State<Arc<Shared>>,
    Path(name): Path<String>,
) -> Result<StatusCode, Failure> {
    beside(move || {
        let name = named(&name)?;
        let file = shared.settings.guests.join(format!("{name}.toml"));
        if !file.is_file() {
            let why = format!("there is no guest file {}", file.display());
            return Err(Failure(StatusCode::NOT_FOUND, why));
        }
        let _turn = lock(&shared.starting);
        receivers::start_guest(&file, &name).map_err(Failure::conflict)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

async fn stop_guest(Path(name): Path<String>) -> Result<StatusCode, Failure> {
    beside(move || {
        let name = named(&name)?;
        output(&["stop", name.as_str()]).map_err(Failure::conflict)?;
        Ok(StatusCode::NO_CONTENT)
    })
    .await
}

/// Checks whether a guest can come, and starts its receiver.
async fn receive(
    State(shared): State<Arc<Shared>>,
    Extension(here): Extension<IpAddr>,
    Json(wanted): Json<Wanted>,
) -> Result<Json<Receiver>, Failure> {
    beside(move || {
        let _turn = lock(&shared.starting);
        let (guests, _) = commands::guests().map_err(Failure::conflict)?;
        let settings = &shared.settings;
        let name = preflight::check(&wanted, settings, &guests).map_err(Failure::conflict)?;
        if wanted.dry_run {
            return Ok(Json(Receiver {
                schema: 1,
                ..Receiver::default()
            }));
        }
        let started =
            receivers::start(&wanted, &name, settings, here).map_err(Failure::conflict)?;
        tracing::info!(%name, uri = started.receiver.uri, "a receiver waits for a guest");
        receivers::follow(started.child, &name);
        Ok(Json(started.receiver))
    })
    .await
}

/// Ends a receiver that has no guest.
async fn end_receiver(Path(name): Path<String>) -> Result<StatusCode, Failure> {
    beside(move || {
        let name = named(&name)?;
        let (guests, _) = commands::guests().map_err(Failure::conflict)?;
        let Some(guest) = guests.iter().find(|guest| guest.name == name.as_str()) else {
            return Ok(StatusCode::NO_CONTENT);
        };
        match (guest.state.as_str(), guest.pid) {
            ("receiving", Some(pid)) => {
                receivers::end(pid).map_err(Failure::conflict)?;
                Ok(StatusCode::NO_CONTENT)
            }
            (state, _) => Err(Failure::conflict(format!(
                "the guest {name} is here ({state}), and no receiver waits for it"
            ))),
        }
    })
    .await
}
