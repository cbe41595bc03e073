//! Accepting connections: so many at a time, whatever becomes of each.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Serves each connection beside the others, until the process ends. At most `most` are served at a
/// time; further ones wait for their turn. `whose` they are is said where one cannot be accepted.
pub async fn each<F>(
    listener: TcpListener,
    (most, whose): (usize, &str),
    serve: impl Fn(TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let turns = Arc::new(Semaphore::new(most));
    // It is never closed.
    while let Ok(turn) = Arc::clone(&turns).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let served = serve(stream, peer);
                tokio::spawn(async move {
                    served.await;
                    drop(turn);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "{whose} connection could not be accepted");
                // It is still there: without descriptors this would go round and round.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
