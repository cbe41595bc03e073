use super::*;
use crate::net::{StreamLink, Unsecured};
use crate::port::Link;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority() -> Authority {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority {
        issuer: Issuer::new(params, key),
        pem,
    }
}

impl Authority {
    /// A host's folder, with certificates for `name` that are valid until `year`.
    fn host(&self, name: &str, year: i32) -> TempDir {
        let dir = TempDir::new().unwrap();
        let put = |file: &str, text: &str| {
            let path = dir.path().join(file);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        };
        put(CA_CERT, &self.pem);
        for (cert, key) in [(SERVER_CERT, SERVER_KEY), (CLIENT_CERT, CLIENT_KEY)] {
            let mut params = CertificateParams::new([name.to_owned()]).unwrap();
            params.not_before = date_time_ymd(2000, 1, 1);
            params.not_after = date_time_ymd(year, 1, 1);
            let pair = KeyPair::generate().unwrap();
            let signed = params.signed_by(&pair, &self.issuer).unwrap();
            put(cert, &signed.pem());
            put(key, &pair.serialize_pem());
        }
        dir
    }
}

const FAR: i32 = 4000;

fn client(dir: &TempDir, name: &str) -> ClientTls {
    ClientTls::with_credentials(&Credentials::source(dir.path()).unwrap(), name).unwrap()
}

fn server(dir: &TempDir, allowed: &[&str]) -> ServerTls {
    let allowed: Vec<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
    ServerTls::with_credentials(&Credentials::receiver(dir.path()).unwrap(), &allowed).unwrap()
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

type Near = io::Result<StreamLink>;
type Far = Result<(StreamLink, Admission), Unsecured>;

fn accept(socket: TcpStream, server: &ServerTls) -> Far {
    let mut link = StreamLink::tcp(socket).unwrap();
    let admission = link.secure_as_receiver(server)?;
    Ok((link, admission))
}

/// Both ends' handshakes, at once.
fn shake_as(client: &ClientTls, session: Option<Secret>, server: &ServerTls) -> (Near, Far) {
    let (near, far) = pair();
    let server = server.clone();
    let far = thread::spawn(move || accept(far, &server));
    let mut link = StreamLink::tcp(near).unwrap();
    let near = link.secure_as_source(client, session).map(|()| link);
    (near, far.join().unwrap())
}

fn shake(client: &ClientTls, server: &ServerTls) -> (Near, Far) {
    shake_as(client, None, server)
}

/// TLS 1.3's client is done before the server has looked at its certificate: it learns of a
/// refusal when it reads.
fn refusal(near: Near) -> String {
    match near {
        Err(error) => error.to_string(),
        Ok(mut link) => link.recv(&mut [0; 1]).unwrap_err().to_string(),
    }
}

fn secret(link: &StreamLink) -> Secret {
    link.secret().unwrap()
}

#[test]
fn bytes_arrive_as_they_were_sent_and_the_secret_is_shared() {
    let authority = authority();
    let (a, b) = (
        authority.host("a.example", FAR),
        authority.host("b.example", FAR),
    );
    let (near, far) = shake(&client(&a, "b.example"), &server(&b, &["a.example"]));
    let (mut near, (mut far, admission)) = (near.unwrap(), far.unwrap());
    assert_eq!(admission, Admission::Certificate);
    assert!(secret(&near).matches(&secret(&far)));
    assert!(near.is_secured() && far.is_secured());

    // More than the session and the sockets take: the receiver reads meanwhile.
    let sent: Vec<u8> = (0..9_000_000u32)
        .map(|i| i.wrapping_mul(7).to_le_bytes()[1])
        .collect();
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        for part in sent.chunks(1_000_001) {
            let (head, body) = part.split_at(100);
            near.send(head, body).unwrap();
        }
        near
    });
    let mut got = vec![0; expected.len()];
    for part in got.chunks_mut(70_001) {
        far.recv(part).unwrap();
    }
    assert!(got == expected);
    drop(sender.join().unwrap());
    let end = far.recv(&mut [0; 1]).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn waiting_takes_no_byte_away_and_sees_what_is_decoded_already() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let (near, far) = shake(&client(&host, "a.example"), &server(&host, &[]));
    let (mut near, (mut far, _)) = (near.unwrap(), far.unwrap());
    assert!(!far.readable().unwrap());
    assert!(!far.wait_readable(Duration::from_millis(5)).unwrap());
    near.send(b"head", b"body").unwrap();
    assert!(far.wait_readable(Duration::from_secs(60)).unwrap());
    let mut bytes = [0; 4];
    far.recv(&mut bytes).unwrap();
    // The rest of the record is in the session: the socket has nothing.
    assert!(far.readable().unwrap());
    far.recv(&mut bytes).unwrap();
    assert_eq!(&bytes, b"body");
    assert!(!far.readable().unwrap());
    drop(near);
    assert!(far.wait_readable(Duration::from_secs(60)).unwrap());
}

#[test]
fn a_peer_that_says_nothing_or_trickles_is_not_waited_for() {
    let authority = authority();
    let tls = server(&authority.host("a.example", FAR), &[]);
    for trickles in [false, true] {
        let (mut near, far) = pair();
        let mut link = StreamLink::tcp(far).unwrap();
        link.set_deadline(Some(Duration::from_millis(600)));
        let talker = thread::spawn(move || {
            // A TLS record of 512 bytes that takes longer than the deadline.
            let _ = near.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]);
            while trickles && near.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
            near
        });
        let session = TlsSession::server(&tls).unwrap();
        let error = link.shake_hands(session).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        drop(link);
        drop(talker.join().unwrap());
    }
}

#[test]
fn each_connection_has_a_secret_of_its_own() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let (tls, receiver) = (client(&host, "a.example"), server(&host, &[]));
    let first = shake(&tls, &receiver).0.unwrap();
    let (second, far) = shake_as(&tls, Some(secret(&first)), &receiver);
    assert!(!secret(&first).matches(&secret(&second.unwrap())));
    assert_eq!(far.unwrap().1, Admission::Session(secret(&first)));
}

#[test]
fn strangers_are_refused_with_the_reason() {
    let (ours, theirs) = (authority(), authority());
    let host = ours.host("a.example", FAR);
    let stranger = theirs.host("a.example", FAR);
    let late = ours.host("a.example", 2001);

    let (near, far) = shake(&client(&stranger, "a.example"), &server(&host, &[]));
    assert!(
        refusal(near).contains("another authority"),
        "the source looks at the receiver, too"
    );
    assert!(far.is_err());

    let (near, _) = shake(&client(&host, "b.example"), &server(&host, &[]));
    assert!(refusal(near).contains("another name"));

    let (near, _) = shake(&client(&host, "a.example"), &server(&late, &[]));
    assert!(refusal(near).contains("has expired"));
    let (near, far) = shake(&client(&late, "a.example"), &server(&host, &[]));
    assert!(far.unwrap_err().to_string().contains("has expired"));
    assert!(refusal(near).contains("this host's certificate has expired"));
}

/// What is sent to a receiver that has refused and gone fails, and not with "broken pipe".
#[test]
fn a_refusal_is_told_where_sending_fails_first() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let late = authority.host("a.example", 2001);
    let (near, far) = shake(&client(&late, "a.example"), &server(&host, &[]));
    drop(far);
    let error = match near {
        Err(error) => error,
        Ok(mut link) => (0..1000)
            .find_map(|_| link.send(&[0; 64], &[]).err())
            .unwrap(),
    };
    let error = error.to_string();
    assert!(
        error.contains("this host's certificate has expired"),
        "{error}"
    );
}

#[test]
fn a_source_of_another_name_is_not_admitted() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let receiver = server(&host, &["c.example", "10.0.0.1"]);
    let (_near, far) = shake(&client(&host, "a.example"), &receiver);
    let Err(Unsecured::Refused(refused)) = far else {
        panic!("{far:?}");
    };
    assert!(refused.to_string().contains("--tls-authz"), "{refused}");
}

#[test]
fn a_client_whose_name_is_its_common_name_is_admitted_by_it() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let mut params = CertificateParams::new([]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "node1");
    let pair = KeyPair::generate().unwrap();
    let signed = params.signed_by(&pair, &authority.issuer).unwrap();
    fs::write(host.path().join(CLIENT_CERT), signed.pem()).unwrap();
    fs::write(host.path().join(CLIENT_KEY), pair.serialize_pem()).unwrap();
    let client = client(&host, "a.example");
    assert!(shake(&client, &server(&host, &["node1"])).1.is_ok());
    assert!(shake(&client, &server(&host, &["node2"])).1.is_err());
}

#[test]
fn a_peer_without_tls_is_recognised() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let plain = |mut socket: TcpStream| {
        socket
            .write_all(b"FERRYMIG, and what else is in a preamble without TLS")
            .unwrap();
        let _ = socket.read(&mut [0; 100]);
    };
    let (near, far) = pair();
    let other = thread::spawn(move || plain(near));
    let error = accept(far, &server(&host, &[])).unwrap_err().to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
    other.join().unwrap();

    let (near, far) = pair();
    let other = thread::spawn(move || plain(far));
    let mut link = StreamLink::tcp(near).unwrap();
    let error = link.secure_as_source(&client(&host, "a.example"), None);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not speak TLS"), "{error}");
    other.join().unwrap();
}

fn pairing() -> Arc<Pairing> {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["ferry-pair".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&key).unwrap();
    let der = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
    Arc::new(Pairing::new(
        certificate.der().clone(),
        der.into(),
        [7; SECRET_BYTES],
    ))
}

#[test]
fn a_pairing_line_lets_in_once() {
    let pairing = pairing();
    let line: PairingLine = pairing.line().to_string().parse().unwrap();
    assert_eq!(line, pairing.line());
    let tls = ClientTls::paired(&line).unwrap();
    let receiver = ServerTls::paired(Arc::clone(&pairing)).unwrap();
    let refused = |client: &ClientTls| {
        let far = shake(client, &receiver).1;
        let Err(Unsecured::Refused(why)) = far else {
            panic!("{far:?}");
        };
        why.to_string()
    };
    let mut guess = line.clone();
    guess.token = Secret([8; SECRET_BYTES]);
    assert!(refused(&ClientTls::paired(&guess).unwrap()).contains("is wrong"));
    let none = ClientTls {
        admission: Admission::Certificate,
        ..tls.clone()
    };
    assert!(refused(&none).contains("brings no token"));

    let (near, far) = shake(&tls, &receiver);
    let (near, (far, _)) = (near.unwrap(), far.unwrap());
    assert!(secret(&near).matches(&secret(&far)));
    assert!(refused(&tls).contains("used before"));
    receiver.restore();
    assert!(shake(&tls, &receiver).1.is_ok());
    assert!(refused(&tls).contains("used before"));
}

#[test]
fn a_token_is_nothing_to_a_receiver_with_certificates_nor_a_certificate_to_a_pairing() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let with_token = ClientTls {
        admission: Admission::Token(Secret([7; SECRET_BYTES])),
        ..client(&host, "a.example")
    };
    let far = shake(&with_token, &server(&host, &[])).1.unwrap_err();
    assert!(far.to_string().contains("migrate --tls DIR"), "{far}");
    let receiver = ServerTls::paired(pairing()).unwrap();
    let (near, far) = shake(&client(&host, "a.example"), &receiver);
    assert!(refusal(near).contains("another authority"));
    assert!(far.is_err());
}

#[test]
fn a_receiver_that_did_not_print_the_line_is_refused() {
    let (one, other) = (pairing(), pairing());
    let tls = ClientTls::paired(&one.line()).unwrap();
    let (near, far) = shake(&tls, &ServerTls::paired(other).unwrap());
    assert!(refusal(near).contains("printed the pairing line"));
    assert!(far.is_err());
}

#[test]
fn pairing_lines_are_checked() {
    let line = pairing().line().to_string();
    assert!(format!(" {line}\n").parse::<PairingLine>().is_ok());
    let bad = [
        "",
        "ferry-pair-1",
        &line[1..],
        &line[..line.len() - 1],
        &format!("{line}:00"),
    ];
    for text in bad {
        assert!(text.parse::<PairingLine>().is_err(), "{text}");
    }
    assert!(
        !format!("{:?}", pairing().line()).contains("0707"),
        "the token is no secret in logs"
    );
}

#[test]
fn an_admission_of_an_unknown_kind_is_none() {
    for admission in [
        Admission::Certificate,
        Admission::Token(Secret([1; SECRET_BYTES])),
        Admission::Session(Secret([2; SECRET_BYTES])),
    ] {
        assert_eq!(Admission::decode(&admission.encode()), Some(admission));
    }
    assert_eq!(Admission::decode(&[9; Admission::BYTES]), None);
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = authority();
    let host = authority.host("a.example", FAR);
    let path = |file: &str| -> PathBuf { host.path().join(file) };
    let source = |dir: &Path| Credentials::source(dir).map(drop).unwrap_err().to_string();

    fs::set_permissions(path(CLIENT_KEY), fs::Permissions::from_mode(0o640)).unwrap();
    let told = source(host.path());
    assert!(
        told.contains("client-key.pem can be read by others (mode 0640)"),
        "{told}"
    );
    fs::set_permissions(path(CLIENT_KEY), fs::Permissions::from_mode(0o600)).unwrap();

    let other = authority.host("a.example", FAR);
    fs::copy(other.path().join(CLIENT_CERT), path(CLIENT_CERT)).unwrap();
    let credentials = Credentials::source(host.path()).unwrap();
    let told = ClientTls::with_credentials(&credentials, "b")
        .unwrap_err()
        .to_string();
    assert!(told.contains("do not belong together"), "{told}");
    let told = ClientTls::with_credentials(&credentials, "")
        .unwrap_err()
        .to_string();
    assert!(told.contains("neither a host name"), "{told}");

    fs::write(path(CA_CERT), "nothing").unwrap();
    assert!(source(host.path()).contains("ca-cert.pem is no certificate"));
    fs::write(path(CA_CERT), vec![b'-'; 3 << 20]).unwrap();
    assert!(source(host.path()).contains("ca-cert.pem is no certificate"));
    fs::remove_file(path(CA_CERT)).unwrap();
    assert!(source(host.path()).contains("cannot read"));
    fs::create_dir(path(CA_CERT)).unwrap();
    assert!(source(host.path()).contains("no regular file"));
}
