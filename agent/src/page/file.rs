//! A migration as one file that needs nothing else.

use super::{MIGRATION_JS, STYLE_CSS, View};
use std::fmt::Write;
use std::io;

const FRAME: &str = include_str!("../../page/report.html");
const REPORT_JS: &str = include_str!("../../page/report.js");

/// The file's text.
///
/// # Errors
/// The system has no random numbers.
pub fn file(view: &View) -> io::Result<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(io::Error::from)?;
    let nonce = random.iter().fold(String::new(), |mut hex, byte| {
        // Writing into a string does not fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let title = match &view.guest {
        Some(guest) => format!("Migration of the guest {guest}"),
        None => "Migration of a guest".to_owned(),
    };
    let data = serde_json::to_string(view)?;
    let values = [
        ("NONCE", nonce),
        ("TITLE", text(&title)),
        ("VERSION", env!("CARGO_PKG_VERSION").to_owned()),
        ("STYLE", STYLE_CSS.to_owned()),
        ("DATA", in_script(&data)),
        ("MIGRATION", MIGRATION_JS.to_owned()),
        ("REPORT", REPORT_JS.to_owned()),
    ];
    Ok(filled(&values))
}

/// The frame with its values. Each part is looked at once: what a value has stays as it is.
fn filled(values: &[(&str, String)]) -> String {
    let parts = FRAME.split('@');
    let value = |part: &str| values.iter().find(|(name, _)| *name == part);
    parts
        .map(|part| value(part).map_or(part, |(_, value)| value))
        .collect()
}

/// Text between tags.
fn text(plain: &str) -> String {
    plain
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// JSON inside of `<script>`: it ends nowhere sooner, and is JavaScript too. In JSON these
/// characters stand only in strings.
fn in_script(json: &str) -> String {
    json.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::report::{Event, Report, Status};

    const ODD: &str = "</script><script>alert(1)</script><!--\u{2028}\u{2029}&@DATA@\"\\";

    #[test]
    fn words_from_outside_end_no_script_and_come_back_whole() {
        let mut view = View::new(Some(ODD.into()), "s".into(), Some(ODD.into()));
        let report = Report::bare("s".into(), ODD.into(), Status::Failed, ODD.into());
        view.receive(&Event::Report(Box::new(report)));
        let whole = file(&view).unwrap();
        assert_eq!(whole.matches("<script").count(), 3, "{whole}");
        assert_eq!(whole.matches("</script>").count(), 3, "{whole}");
        let (_, data) = whole.split_once("id=\"data\">").unwrap();
        let (data, _) = data.split_once("</script>").unwrap();
        assert!(!data.contains(['\u{2028}', '\u{2029}', '<', '>', '&']));
        let read: serde_json::Value = serde_json::from_str(data).unwrap();
        for at in ["/guest", "/record/to", "/record/report/error"] {
            assert_eq!(read.pointer(at).unwrap(), ODD, "{at}");
        }
    }

    #[test]
    fn it_loads_nothing_and_runs_only_its_own_scripts() {
        let view = View::new(None, "s".into(), None);
        let whole = file(&view).unwrap();
        let (_, policy) = whole
            .split_once("Content-Security-Policy\" content=\"")
            .unwrap();
        let policy = policy.split_once('"').unwrap().0;
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
        let (_, nonce) = policy.split_once("script-src 'nonce-").unwrap();
        let nonce = nonce.split_once('\'').unwrap().0;
        assert_eq!(nonce.len(), 32);
        assert_eq!(
            whole
                .matches(&format!("<script nonce=\"{nonce}\">"))
                .count(),
            2
        );
        assert_ne!(file(&view).unwrap(), whole, "a nonce is used once");
        for outside in ["src=", "@import", "url(", "https://"] {
            assert!(!whole.contains(outside), "{outside}");
        }
        // A name of a namespace is not loaded.
        assert_eq!(whole.matches("http://").count(), 1);
        assert!(!FRAME.split('@').any(str::is_empty));
    }
}
