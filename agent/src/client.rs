//! A client of an agent, for commands: one request after the other, each on a connection of its
//! own.

use crate::types::{Host, Receiver, Wanted};
use ferry_migration::net::tls::{ClientTls, Credentials, TlsError, sentence};
use ferry_vmm::api::types::ErrorBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, rustls};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long an answer may take: a receiver is started meanwhile.
const ANSWER: Duration = Duration::from_secs(40);
/// The largest answer.
const BODY: usize = 4 << 20;

/// Why an agent did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// This side's certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// It is not reached.
    #[error("the agent of {host} is not reached ({cause}); does `ferry agent` run there?")]
    Connect {
        /// The host.
        host: String,
        /// Why.
        cause: io::Error,
    },
    /// One side does not trust the other.
    #[error("{host}: {why}")]
    Untrusted {
        /// The host.
        host: String,
        /// Why.
        why: String,
    },
    /// The connection failed, or its answer is none.
    #[error("the agent of {host} did not answer ({cause})")]
    Lost {
        /// The host.
        host: String,
        /// Why.
        cause: String,
    },
    /// It refused.
    #[error("{host}: {error}")]
    Refused {
        /// The host.
        host: String,
        /// Its sentence.
        error: String,
    },
}

/// The agent of a host.
#[derive(Clone, Debug)]
pub struct Agent {
    host: String,
    port: u16,
    tls: ClientTls,
    connect: Duration,
    answer: Duration,
}

impl Agent {
    /// Of the host that `place` names: `HOST` or `HOST:PORT`. Its certificate must carry `authz`,
    /// or the host's name.
    ///
    /// # Errors
    /// [`AgentError::Tls`].
    pub fn new(place: &str, tls: &Path, authz: Option<&str>) -> Result<Self, AgentError> {
        let (host, port) = split(place);
        let credentials = Credentials::source(tls)?;
        let name = authz.unwrap_or_else(|| host.trim_matches(['[', ']']));
        Ok(Self {
            tls: ClientTls::with_credentials(&credentials, name)?,
            host: host.to_owned(),
            port,
            connect: CONNECT,
            answer: ANSWER,
        })
    }

    /// With so long for being reached, for the handshake, and for each answer: for a question that
    /// starts nothing.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self {
            connect: deadline,
            answer: deadline,
            ..self
        }
    }

    /// The host's name, as it was given.
    #[must_use]
    pub fn host_name(&self) -> &str {
        &self.host
    }

    /// What the host has.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn host(&self) -> Result<Host, AgentError> {
        self.request(Method::GET, "/v1/host", &())
    }

    /// Asks for a receiver.
    ///
    /// # Errors
    /// [`AgentError`]; refused with all that is wrong.
    pub fn receive(&self, wanted: &Wanted) -> Result<Receiver, AgentError> {
        self.request(Method::POST, "/v1/receivers", wanted)
    }

    /// Ends a receiver to which no guest has come.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn end_receiver(&self, name: &str) -> Result<(), AgentError> {
        self.request(Method::DELETE, &format!("/v1/receivers/{name}"), &())
    }

    fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, AgentError> {
        let lost = |cause: String| AgentError::Lost {
            host: self.host.clone(),
            cause,
        };
        let body = match method {
            Method::GET | Method::DELETE => Vec::new(),
            _ => serde_json::to_vec(body).map_err(|e| lost(e.to_string()))?,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|e| lost(e.to_string()))?;
        let (status, bytes) = runtime.block_on(async {
            let stream = self.connect().await?;
            let exchange = exchange(stream, method, path, &self.host, body);
            let answer = timeout(self.answer, exchange).await;
            let answer = answer.map_err(|_| lost("it took too long".into()))?;
            // What the agent says of this side's certificate comes with its first answer.
            answer.map_err(|error| {
                let untrusted = self.untrusted(&*error);
                untrusted.unwrap_or_else(|| lost(error.to_string()))
            })
        })?;
        if status.is_success() {
            // An answer without a body is `null`.
            let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
            return serde_json::from_slice(text).map_err(|e| lost(e.to_string()));
        }
        let error = match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => body
                .error
                .chars()
                .filter(|c| !c.is_control())
                .take(2000)
                .collect(),
            Err(_) => format!("HTTP status {status}"),
        };
        Err(AgentError::Refused {
            host: self.host.clone(),
            error,
        })
    }

    /// If it is TLS that has failed.
    fn untrusted(&self, error: &(dyn Error + 'static)) -> Option<AgentError> {
        let mut next = Some(error);
        while let Some(error) = next {
            let wrapped = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref);
            let tls = match wrapped {
                Some(wrapped) => wrapped.downcast_ref::<rustls::Error>(),
                None => error.downcast_ref::<rustls::Error>(),
            };
            if let Some(tls) = tls {
                return Some(AgentError::Untrusted {
                    host: self.host.clone(),
                    why: sentence(tls),
                });
            }
            next = error.source();
        }
        None
    }

    async fn connect(&self) -> Result<tokio_rustls::client::TlsStream<TcpStream>, AgentError> {
        let failed = |cause: io::Error| {
            self.untrusted(&cause)
                .unwrap_or_else(|| AgentError::Connect {
                    host: self.host.clone(),
                    cause,
                })
        };
        let slow = |_| failed(io::ErrorKind::TimedOut.into());
        let address = self.host.trim_matches(['[', ']']);
        let stream = TcpStream::connect((address, self.port));
        let stream = timeout(self.connect, stream)
            .await
            .map_err(slow)?
            .map_err(failed)?;
        let connector = TlsConnector::from(self.tls.config());
        let secured = connector.connect(self.tls.name().clone(), stream);
        timeout(self.connect, secured)
            .await
            .map_err(slow)?
            .map_err(failed)
    }
}

/// `HOST` or `HOST:PORT`; an IPv6 address with a port stands in brackets.
fn split(place: &str) -> (&str, u16) {
    match place.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => port
            .parse()
            .map_or((place, super::PORT), |port| (host, port)),
        _ => (place, super::PORT),
    }
}

async fn exchange(
    stream: tokio_rustls::client::TlsStream<TcpStream>,
    method: Method,
    path: &str,
    host: &str,
    body: Vec<u8>,
) -> Result<(StatusCode, Bytes), Box<dyn Error + Send + Sync>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", host)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), BODY).collect().await?;
    let bytes = body.to_bytes();
    driver.abort();
    Ok((status, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_host_and_a_port_or_a_host() {
        for (place, host, port) in [
            ("hostb", "hostb", crate::PORT),
            ("hostb:7100", "hostb", 7100),
            ("192.0.2.1:1", "192.0.2.1", 1),
            ("2001:db8::1", "2001:db8::1", crate::PORT),
            ("[2001:db8::1]:9", "[2001:db8::1]", 9),
            ("hostb:http", "hostb:http", crate::PORT),
        ] {
            assert_eq!(split(place), (host, port), "{place}");
        }
    }
}
