//! The page's server: plain HTTP on a loopback address, for reading.
//!
//! A browser on this host is trusted as far as its user is. What other sites have it do is not: a
//! request is answered only where it was meant for a loopback name (a foreign site that has its
//! name resolved to 127.0.0.1 is not), nothing may be embedded elsewhere, and no script runs that
//! the agent did not serve.

use super::scene::{Overview, Scene};
use super::{MIGRATION_JS, STYLE_CSS, View, watch};
use crate::accept;
use crate::server::{ServeError, this_host};
use crate::settings::Settings;
use axum::extract::{Path, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const INDEX_HTML: &str = include_str!("../../page/index.html");
const LIVE_JS: &str = include_str!("../../page/live.js");
const ICON_SVG: &str = include_str!("../../page/icon.svg");

/// Connections at a time; further ones wait for their turn. A browser has up to six.
const CONNECTIONS: usize = 32;
/// How long a request's head, and an idle connection, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// After so long a connection ends with its next answer.
const LONGEST: Duration = Duration::from_secs(120);

/// Nothing but what the agent serves; and no other page around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Listens where the settings say, if they do; begins to watch guests and peers.
pub async fn listen(settings: &Settings) -> Result<Option<(TcpListener, Router)>, ServeError> {
    let Some(address) = settings.page else {
        return Ok(None);
    };
    if !address.ip().to_canonical().is_loopback() {
        return Err(ServeError::PageNotLoopback(address));
    }
    let listener = TcpListener::bind(address)
        .await
        .map_err(|cause| ServeError::Listen { address, cause })?;
    let peers = &settings.peers[..settings.peers.len().min(watch::PEERS)];
    let scene = Arc::new(Scene::new(peers));
    watch::begin(&scene, settings)?;
    Ok(Some((listener, router(scene))))
}

fn router(scene: Arc<Scene>) -> Router {
    let part = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(CONTENT_TYPE, kind)], text) })
    };
    const JS: &str = "text/javascript; charset=utf-8";
    Router::new()
        .route("/", part("text/html; charset=utf-8", INDEX_HTML))
        .route("/style.css", part("text/css; charset=utf-8", STYLE_CSS))
        .route("/migration.js", part(JS, MIGRATION_JS))
        .route("/live.js", part(JS, LIVE_JS))
        .route("/icon.svg", part("image/svg+xml", ICON_SVG))
        .route("/v1/overview", get(overview))
        .route("/v1/migrations/{id}", get(migration))
        .layer(from_fn(guard))
        .with_state(scene)
}

async fn overview(State(scene): State<Arc<Scene>>) -> Json<Overview> {
    Json(scene.overview(this_host(Vec::new())))
}

async fn migration(
    State(scene): State<Arc<Scene>>,
    Path(id): Path<String>,
) -> Result<Json<View>, (StatusCode, &'static str)> {
    let gone = (StatusCode::NOT_FOUND, "no migration of that ID is known\n");
    scene.migration(&id).map(Json).ok_or(gone)
}

/// Refuses what was not meant for this page, and says with each answer what a browser may do.
async fn guard(request: Request, next: Next) -> Response {
    let mut response = if is_for_loopback(request.uri(), request.headers()) {
        next.run(request).await
    } else {
        let why = "this page is for localhost: reach it by a tunnel, such as ssh -L 7008:localhost:7008 HOST\n";
        (StatusCode::MISDIRECTED_REQUEST, why).into_response()
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Whether a request names this host by a loopback address or `localhost`, with any port: that of a
/// tunnel is another.
fn is_for_loopback(uri: &Uri, headers: &HeaderMap) -> bool {
    let mut named = headers.get_all(HOST).iter();
    let (Some(host), None) = (named.next(), named.next()) else {
        return false;
    };
    let is_loopback = |authority: &Authority| {
        let host = authority.host();
        let plain = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost")
            || plain.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
    };
    let host = host.to_str().ok().and_then(|host| host.parse().ok());
    host.as_ref().is_some_and(is_loopback) && uri.authority().is_none_or(is_loopback)
}

/// Serves until the process ends.
pub async fn serve_each(listener: TcpListener, router: Router) {
    accept::each(listener, (CONNECTIONS, "a browser's"), |stream, peer| {
        let router = router.clone();
        async move {
            if let Err(why) = connection(stream, router).await {
                tracing::debug!(%peer, "a browser's connection ended: {why}");
            }
        }
    })
    .await;
}

/// Serves one connection; the end of the browser's side ends it.
async fn connection(stream: TcpStream, router: Router) -> Result<(), hyper::Error> {
    let mut served = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
    );
    if let Ok(ended) = timeout(LONGEST, served.as_mut()).await {
        return ended;
    }
    served.as_mut().graceful_shutdown();
    timeout(PATIENCE, served).await.unwrap_or(Ok(()))
}

/// Where a browser finds it.
pub fn url(address: SocketAddr) -> String {
    format!("http://{address}/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn is_answered(host: &str, target: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, host.parse().unwrap());
        is_for_loopback(&target.parse().unwrap(), &headers)
    }

    #[test]
    fn only_loopback_names_are_answered() {
        for host in [
            "localhost",
            "LocalHost:8080",
            "127.0.0.1:7008",
            "127.9.9.9",
            "[::1]:7008",
        ] {
            assert!(is_answered(host, "/"), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:7008",
            "192.0.2.7:7008",
            "0.0.0.0",
            "",
            "a@localhost@b",
        ] {
            assert!(!is_answered(host, "/"), "{host}");
        }
        assert!(!is_answered("localhost", "http://evil.example/"));
        assert!(!is_for_loopback(&"/".parse().unwrap(), &HeaderMap::new()));
        let mut two = HeaderMap::new();
        two.append(HOST, HeaderValue::from_static("localhost"));
        two.append(HOST, HeaderValue::from_static("localhost"));
        assert!(!is_for_loopback(&"/".parse().unwrap(), &two));
    }

    /// One request on a connection of its own.
    fn request(at: SocketAddr, head: &str) -> String {
        let mut stream = std::net::TcpStream::connect(at).unwrap();
        let whole = format!("{head}\r\nConnection: close\r\n\r\n");
        stream.write_all(whole.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn served() -> SocketAddr {
        let (say, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                say.send(listener.local_addr().unwrap()).unwrap();
                serve_each(listener, router(Arc::new(Scene::new(&[])))).await;
            });
        });
        heard.recv().unwrap()
    }

    #[test]
    fn it_is_read_only_and_says_what_a_browser_may_do() {
        let at = served();
        let get = |path: &str| request(at, &format!("GET {path} HTTP/1.1\r\nHost: localhost"));
        for path in [
            "/",
            "/style.css",
            "/migration.js",
            "/live.js",
            "/icon.svg",
            "/v1/overview",
        ] {
            let answer = get(path);
            assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
            let lower = answer.to_lowercase();
            for header in [
                "content-security-policy: default-src 'none'",
                "cache-control: no-store",
                "x-content-type-options: nosniff",
                "cross-origin-resource-policy: same-origin",
            ] {
                assert!(lower.contains(header), "{path}: {header} in {answer}");
            }
            assert!(!lower.contains("unsafe-inline") && !lower.contains("access-control"));
        }
        assert!(get("/v1/migrations/x").starts_with("HTTP/1.1 404 "));
        assert!(get("/v1/guests").starts_with("HTTP/1.1 404 "));
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let head = format!("{method} /v1/overview HTTP/1.1\r\nHost: localhost");
            let answer = request(at, &head);
            assert!(answer.starts_with("HTTP/1.1 405 "), "{method}: {answer}");
        }
        let answer = request(at, "GET /v1/overview HTTP/1.1\r\nHost: evil.example");
        assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
        assert!(
            !answer.contains("schema") && answer.contains("ssh -L"),
            "{answer}"
        );
    }

    #[test]
    fn browsers_that_go_away_leave_room_for_others() {
        let at = served();
        for _ in 0..3 * CONNECTIONS {
            let mut gone = std::net::TcpStream::connect(at).unwrap();
            gone.write_all(b"GET / HTTP/1.1\r\nHost: ").unwrap();
        }
        let answer = request(at, "GET / HTTP/1.1\r\nHost: localhost");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }

    #[test]
    fn no_script_and_no_style_stands_in_the_page() {
        for inline in ["<script>", "<style", " style=", " onclick", "javascript:"] {
            assert!(!INDEX_HTML.contains(inline), "{inline}");
        }
        for code in [LIVE_JS, MIGRATION_JS] {
            for unsafe_way in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "Function(",
            ] {
                assert!(!code.contains(unsafe_way), "{unsafe_way}");
            }
        }
    }
}
