//! `ferry balloon`, and what `ferry run --balloon` takes.

use super::outcome::Ended;
use ferry_terminal::flags::{TargetAnd, Word};
use ferry_terminal::output::{put, put_json, say};
use ferry_terminal::rows::Rows;
use ferry_terminal::units::{duration, memory, size, span};
use ferry_vmm::api::client::Client;
use ferry_vmm::api::types::{BalloonRequest, BalloonStatus, BalloonWish, GuestMemory};
use std::ffi::OsString;
use std::process::ExitCode;

/// Show or set the balloon in a guest's memory. The guest does not use the pages in it, and a
/// migration does not send them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry balloon web                   what is in it, and what the guest says of its memory
  ferry balloon web 512M              takes 512 MiB from the guest
  ferry balloon web auto              takes what the guest does not use, and gives it back in time
  ferry balloon web auto,interval=1s,reserve=64M
  ferry balloon web off               gives the guest all of its memory")]
pub struct Args {
    #[command(flatten)]
    target: TargetAnd<NewSetting>,
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
}

/// What the balloon is to be set to, if it is.
#[derive(Clone, Copy, Debug)]
struct NewSetting(Option<Setting>);

impl Word for NewSetting {
    const VALUE: &'static str = "SIZE|auto|off";
    const HELP: &'static str =
        "The balloon's size, or auto (with interval=TIME and reserve=SIZE, if you like), or off";

    fn read(word: Option<OsString>) -> Result<Self, String> {
        let word = word.map(|word| {
            let word = word.to_string_lossy();
            Setting::parse(&word)
                .map_err(|why| format!("invalid value '{word}' for '[{}]': {why}", Self::VALUE))
        });
        Ok(Self(word.transpose()?))
    }
}

/// What a balloon can be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// As many bytes.
    Size(u64),
    /// What the guest does not use.
    Auto(BalloonWish),
}

impl Setting {
    /// Reads `SIZE`, `auto[,interval=TIME][,reserve=SIZE]`, `on` (a balloon with nothing in it,
    /// yet) or `off`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        match words.next() {
            Some("auto") => {}
            Some("on" | "off") if words.next().is_none() => return Ok(Self::Size(0)),
            _ => {
                let size = size(text).map_err(|_| "a balloon is auto, off, or a size such as 512M");
                return size.map(Self::Size).map_err(str::to_owned);
            }
        }
        let mut wish = BalloonWish::default();
        for word in words {
            match word.split_once('=') {
                Some(("interval", time)) => {
                    let ms = u32::try_from(duration(time)?.as_millis());
                    wish.interval_ms = Some(ms.unwrap_or(u32::MAX));
                }
                Some(("reserve", bytes)) => wish.reserve_bytes = Some(size(bytes)?),
                _ => {
                    return Err(format!(
                        "`{word}` is not known; auto takes interval=TIME and reserve=SIZE"
                    ));
                }
            }
        }
        Ok(Self::Auto(wish))
    }

    /// For the control socket, or for a machine that is here.
    pub fn request(self) -> BalloonRequest {
        match self {
            Self::Size(bytes) => BalloonRequest {
                size_bytes: Some(bytes),
                auto: None,
            },
            Self::Auto(wish) => BalloonRequest {
                size_bytes: None,
                auto: Some(wish),
            },
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode, Ended> {
    let client = Client::new(&args.target.socket()?);
    if let Some(setting) = args.target.word.0 {
        client.set_balloon(&setting.request())?;
        if !args.json {
            say(&match setting {
                Setting::Size(0) => "the guest gets back all of its memory".to_owned(),
                Setting::Size(bytes) => {
                    format!("the guest is asked for {}", memory(bytes))
                }
                Setting::Auto(_) => "the guest gives what it does not use".to_owned(),
            });
            return Ok(ExitCode::SUCCESS);
        }
    }
    let balloon = client.balloon()?;
    if args.json {
        put_json(&balloon)?;
    } else {
        put(&text(&balloon))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(balloon: &BalloonStatus) -> String {
    let mut rows = Rows::default();
    show(balloon, &mut rows);
    rows.text()
}

/// For people, also in `ferry status`.
pub fn show(balloon: &BalloonStatus, rows: &mut Rows) {
    let auto = balloon.auto.map_or(String::new(), |auto| {
        format!(
            ", moved every {} to leave {}",
            span(f64::from(auto.interval_ms)),
            memory(auto.reserve_bytes)
        )
    });
    let driver = match balloon.driver {
        true => "",
        false => "; the guest has no driver for it",
    };
    rows.add(
        "balloon",
        format!(
            "{} of {}{auto}; {} went back to the host{driver}",
            memory(balloon.actual_bytes),
            memory(balloon.target_bytes),
            memory(balloon.discarded_bytes)
        ),
    );
    if let Some(guest) = &balloon.guest {
        rows.add("memory", says(guest));
    }
}

fn says(guest: &GuestMemory) -> String {
    let sizes = [
        ("free", guest.free_bytes),
        ("available", guest.available_bytes),
        ("of caches", guest.caches_bytes),
        ("in all", guest.total_bytes),
    ];
    let mut said: Vec<String> = sizes
        .iter()
        .filter_map(|(name, bytes)| Some(format!("{} {name}", memory((*bytes)?))))
        .collect();
    let counts = [
        ("bytes swapped out", guest.swapped_out_bytes),
        ("processes killed for memory", guest.oom_kills),
    ];
    let counts = counts
        .iter()
        .filter_map(|(name, n)| Some(((*n).filter(|n| *n > 0)?, name)));
    said.extend(counts.map(|(n, name)| format!("{n} {name}")));
    let when = guest.age_ms.map_or_else(
        || "before it came here".to_owned(),
        // Exact to 2⁵³ milliseconds.
        #[allow(clippy::cast_precision_loss)]
        |ms| format!("{} ago", span(ms as f64)),
    );
    format!("{} (said the guest {when})", said.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_vmm::machine::BalloonAuto;

    #[test]
    fn settings_are_read_and_nonsense_is_told() {
        let auto = |interval_ms, reserve_bytes| {
            Ok(Setting::Auto(BalloonWish {
                interval_ms,
                reserve_bytes,
            }))
        };
        assert_eq!(Setting::parse("auto"), auto(None, None));
        assert_eq!(
            Setting::parse("auto,interval=1s,reserve=64M"),
            auto(Some(1000), Some(64 << 20))
        );
        assert_eq!(Setting::parse("512M"), Ok(Setting::Size(512 << 20)));
        for nothing in ["on", "off", "0"] {
            assert_eq!(Setting::parse(nothing), Ok(Setting::Size(0)));
        }
        for bad in ["", "auto,", "auto,x=1", "off,1", "5X", "auto,interval=5"] {
            assert!(Setting::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_balloon_for_people() {
        let mut balloon = BalloonStatus {
            target_bytes: 512 << 20,
            actual_bytes: 500 << 20,
            driver: true,
            discarded_bytes: 700 << 20,
            auto: Some(BalloonAuto {
                interval_ms: 5000,
                reserve_bytes: 51 << 20,
            }),
            guest: Some(GuestMemory {
                age_ms: Some(1500),
                free_bytes: Some(300 << 20),
                available_bytes: Some(310 << 20),
                oom_kills: Some(2),
                ..GuestMemory::default()
            }),
        };
        assert_eq!(
            text(&balloon),
            "balloon    500 MiB of 512 MiB, moved every 5.00 s to leave 51 MiB; 700 MiB went back to the host\n\
             memory     300 MiB free, 310 MiB available, 2 processes killed for memory (said the guest 1.50 s ago)\n"
        );
        balloon.auto = None;
        balloon.guest = None;
        balloon.driver = false;
        assert_eq!(
            text(&balloon),
            "balloon    500 MiB of 512 MiB; 700 MiB went back to the host; the guest has no driver for it\n"
        );
    }
}
