//! `ferry pki`: an authority, and certificates of hosts, in files named as QEMU and Cloud
//! Hypervisor have them.

use ferry_migration::net::tls::pki_types::{DnsName, PrivateKeyDer, PrivatePkcs8KeyDer};
use ferry_migration::net::tls::{
    CA_CERT, CLIENT_CERT, CLIENT_KEY, Pairing, SECRET_BYTES, SERVER_CERT, SERVER_KEY, identity_of,
};
use ferry_terminal::output::{Failure, say};
use ferry_vmm::new_file::{Making, NewFile};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use time::{Duration, OffsetDateTime};

/// The authority's private key; no file of any VMM.
const CA_KEY: &str = "ca-key.pem";
/// Days of an authority: ten years.
const CA_DAYS: u32 = 3650;
/// The most days of a certificate: what is left of a calendar that X.509 can write.
const MAX_DAYS: u32 = 36_500;

/// Make certificates for --tls: an authority once, then a folder for each host.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  ferry pki init pki
  ferry pki host pki node1 node1.example 192.0.2.1
  ferry pki host pki node2 node2.example 192.0.2.2
then copy pki/node1 and pki/node2 to these hosts, for --tls there. Who has pki/ca-key.pem can make more.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Init(Init),
    Host(Host),
}

/// Make an authority.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry pki init pki")]
struct Init {
    /// The folder to make it in.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Make a host's certificates, as a source and as a receiver; again to renew them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry pki host pki node1 node1.example 192.0.2.1")]
struct Host {
    /// The authority's folder.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The host's name, and the other names and addresses that sources connect to it by. The files
    /// are put into a folder of the first name.
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// For how long.
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_DAYS)))]
    days: u32,
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Init(init) => make_authority(&init.dir)?,
        Command::Host(host) => make_host(&host.dir, &host.names, host.days)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn failed(error: &rcgen::Error) -> Failure {
    Failure(format!("a certificate cannot be made ({error})"))
}

fn at(path: &Path, error: &io::Error) -> Failure {
    Failure(format!("{}: {error}", path.display()))
}

/// The authority of a key. Its name comes from the key, so that it can be found again, and no two
/// authorities have one.
fn authority(key: &KeyPair) -> CertificateParams {
    let id = CertificateParams::default().key_identifier(key);
    // 64 bits of it tell a few authorities apart.
    let id: String = id
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut params = params(&format!("ferry CA {id}"), CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn params(name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    // A day for clocks that differ.
    params.not_before = now - Duration::days(1);
    params.not_after = now + Duration::days(days.into());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn make_authority(dir: &Path) -> Result<(), Failure> {
    let key_path = dir.join(CA_KEY);
    for path in [&key_path, &dir.join(CA_CERT)] {
        if path.exists() {
            return Err(Failure(format!(
                "{} is there already; a new authority needs another folder",
                path.display()
            )));
        }
    }
    let key = KeyPair::generate().map_err(|e| failed(&e))?;
    let params = authority(&key);
    let certificate = params.self_signed(&key).map_err(|e| failed(&e))?;
    make_folder(dir)?;
    put(&key_path, &key.serialize_pem(), 0o600)?;
    put(&dir.join(CA_CERT), &certificate.pem(), 0o644)?;
    say(&format!(
        "made an authority in {}; keep {} secret: who has it can make certificates",
        dir.display(),
        key_path.display()
    ));
    Ok(())
}

fn make_host(dir: &Path, names: &[String], days: u32) -> Result<(), Failure> {
    let first = names.first().map_or("", String::as_str);
    if first.starts_with('.') || first.contains('/') {
        return Err(Failure(format!(
            "'{first}' cannot be a host's folder; give its name first"
        )));
    }
    let (issuer, ca) = open_authority(dir)?;
    let folder = dir.join(first);
    let renewed = folder.join(SERVER_CERT).exists();
    make_folder(&folder)?;
    put(&folder.join(CA_CERT), &ca, 0o644)?;
    for (cert, key_file, usage) in [
        (SERVER_CERT, SERVER_KEY, ExtendedKeyUsagePurpose::ServerAuth),
        (CLIENT_CERT, CLIENT_KEY, ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = params(first, days);
        params.subject_alt_names = names
            .iter()
            .map(|name| alternative(name))
            .collect::<Result<_, _>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(|e| failed(&e))?;
        let signed = params.signed_by(&key, &issuer).map_err(|e| failed(&e))?;
        put(&folder.join(key_file), &key.serialize_pem(), 0o600)?;
        put(&folder.join(cert), &signed.pem(), 0o644)?;
    }
    say(&format!(
        "{} {} for {}, good for {days} days; copy it to that host, for --tls there",
        if renewed { "renewed" } else { "made" },
        folder.display(),
        names.join(", ")
    ));
    Ok(())
}

fn alternative(name: &str) -> Result<SanType, Failure> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    // What rustls could not look for is of no use in a certificate.
    let usable = DnsName::try_from(name).is_ok();
    match name.try_into() {
        Ok(dns) if usable => Ok(SanType::DnsName(dns)),
        _ => Err(Failure(format!(
            "'{name}' is neither a host name nor an IP address, so no certificate can carry it"
        ))),
    }
}

/// The authority in a folder, and its certificate.
fn open_authority(dir: &Path) -> Result<(Issuer<'static, KeyPair>, String), Failure> {
    let read = |file: &str| {
        let path = dir.join(file);
        fs::read_to_string(&path).map_err(|error| {
            Failure(format!(
                "cannot read {} ({error}); `ferry pki init {}` makes an authority",
                path.display(),
                dir.display()
            ))
        })
    };
    let (ca, key) = (read(CA_CERT)?, read(CA_KEY)?);
    let key_path = dir.join(CA_KEY);
    let key = KeyPair::from_pem(&key)
        .map_err(|e| Failure(format!("{} is no private key ({e})", key_path.display())))?;
    let params = authority(&key);
    let ours = params.self_signed(&key).map_err(|e| failed(&e))?;
    // By its name and key a certificate of ours is known; another tool's has other names.
    if identity_of(&ca) != identity_of(&ours.pem()) {
        return Err(Failure(format!(
            "{} was not made by `ferry pki init` with {}; make host certificates with the tool that made it",
            dir.join(CA_CERT).display(),
            key_path.display()
        )));
    }
    Ok((Issuer::new(params, key), ca))
}

/// A certificate for one guest, and a random token.
pub fn pairing() -> Result<Pairing, Failure> {
    let mut token = [0; SECRET_BYTES];
    getrandom::fill(&mut token)
        .map_err(|e| Failure(format!("there are no random numbers for a token ({e})")))?;
    let key = KeyPair::generate().map_err(|e| failed(&e))?;
    let certificate = params("ferry-pair", 1)
        .self_signed(&key)
        .map_err(|e| failed(&e))?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Ok(Pairing::new(certificate.der().clone(), key, token))
}

fn make_folder(dir: &Path) -> Result<(), Failure> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    made.map_err(|e| at(dir, &e))
}

/// Writes a whole file or none: a VMM may be reading the old one.
fn put(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    // Of mode 0600, before there is anything in it.
    let making = Making {
        replace: true,
        private: true,
    };
    let file = NewFile::create(path, making)?;
    file.file()
        .write_all(text.as_bytes())
        .and_then(|()| {
            let permissions = fs::Permissions::from_mode(mode);
            file.file().set_permissions(permissions)
        })
        .map_err(|e| at(path, &e))?;
    Ok(file.publish()?)
}
