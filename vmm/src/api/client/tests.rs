use super::*;
use proptest::prelude::*;
use std::os::unix::net::UnixListener;

/// A client's view of a server that answers with these bytes.
fn against(bytes: &'static [u8]) -> (ClientError, Option<ClientError>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            let _ = stream.write_all(bytes);
        }
    });
    let client = Client::new(&path);
    let a = client.status().unwrap_err();
    let request = MigrateRequest {
        uri: "tcp:x:1".into(),
        options: Default::default(),
        ..MigrateRequest::default()
    };
    let b = client.migrate(&request, &mut |_| {}).err();
    server.join().unwrap();
    (a, b)
}

#[test]
fn says_what_is_wrong_with_the_other_side() {
    let foreign = |bytes| {
        let (a, b) = against(bytes);
        assert!(matches!(a, ClientError::Foreign { .. }), "{a}");
        b
    };
    foreign(b"SSH-2.0-OpenSSH_9\r\n\r\n\r\n");
    foreign(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope");
    foreign(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    let b = foreign(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n");
    assert!(matches!(b, Some(ClientError::Foreign { .. })), "{b:?}");
    let (a, b) = against(b"");
    assert!(matches!(a, ClientError::Lost { .. }), "{a}");
    assert!(matches!(b, Some(ClientError::Lost { .. })), "{b:?}");
    let (a, _) =
        against(b"HTTP/1.1 409 Conflict\r\nContent-Length: 19\r\n\r\n{\"error\":\"a\\u001b\"}");
    assert_eq!(
        a.to_string(),
        "a ",
        "control characters do not reach the terminal"
    );
}

#[test]
fn says_when_no_server_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let text = Client::new(&path).status().unwrap_err().to_string();
    assert!(text.starts_with("there is no socket "), "{text}");
    crate::socket::tests::leave(&path);
    let text = Client::new(&path).status().unwrap_err().to_string();
    assert!(text.starts_with("no ferry answers on "), "{text}");
    assert!(text.ends_with("is the guest's VMM running?"), "{text}");
    let text = Client::new(&dir.path().join("x".repeat(200)))
        .status()
        .unwrap_err()
        .to_string();
    assert!(text.contains("longer than 107 bytes"), "{text}");
}

proptest! {
    #[test]
    fn any_head_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = read_head(&mut &bytes[..]);
    }
}
