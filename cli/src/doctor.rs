//! `ferry doctor`.

use ferry_terminal::output::{Failure, put, put_json};
use ferry_vmm::doctor::{Diagnosis, Need, cpu, examine};
use ferry_vmm::machine::CpuFile;
use std::path::PathBuf;
use std::process::ExitCode;

/// Say what this host can do, which kind of KVM it has, and what to do about what is missing.
///
/// Exits with 0 when guests can run here, 1 otherwise.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  ferry doctor
  ferry doctor --json | jq .kind
  ferry doctor --cpu-json >a.json
  ferry doctor --baseline a.json b.json >fleet.json")]
pub struct Args {
    /// Print one JSON object instead.
    #[arg(long)]
    json: bool,
    /// Print the CPU that this host can give to a guest, for --baseline.
    #[arg(long, conflicts_with = "json")]
    cpu_json: bool,
    /// Print what the CPUs of these files (of --cpu-json) have in common, for `ferry run --cpu`: a
    /// guest with that can move between any two of the hosts.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["json", "cpu_json"])]
    baseline: Vec<PathBuf>,
}

pub fn run(args: &Args) -> Result<ExitCode, Failure> {
    if args.cpu_json {
        put_json(&cpu()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.baseline.is_empty() {
        let files = args.baseline.iter().map(|path| CpuFile::read(path));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        put_json(&CpuFile::baseline(&files)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let diagnosis = examine();
    if args.json {
        put_json(&diagnosis)?
    } else {
        put(&text(&diagnosis))?
    }
    Ok(if diagnosis.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn text(d: &Diagnosis) -> String {
    let or = |text: &str, other: &str| {
        if text.is_empty() {
            other.to_owned()
        } else {
            text.to_owned()
        }
    };
    let modules = or(&d.modules.join(" "), "no KVM module");
    let mut text = format!(
        "{}\nLinux {}, {}, {modules}\n\n",
        d.kind.meaning(),
        or(&d.kernel, "of unknown version"),
        or(&d.cpu, "unknown processor")
    );
    let width = d.checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    for check in &d.checks {
        let (mark, needed) = match (check.ok, check.need) {
            (true, _) => ("✓", ""),
            (false, Need::Required) => ("✗", "NEEDED: "),
            (false, _) => ("✗", ""),
        };
        text += &format!("{mark} {:<width$}  {needed}{}\n", check.name, check.found);
        if let Some(advice) = &check.advice {
            text += &format!("  {:<width$}  → {advice}\n", "");
        }
    }
    text += if d.ready {
        "\nGuests can run here.\n"
    } else {
        "\nGuests cannot run here until what is NEEDED above is there.\n"
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_vmm::doctor::{Check, Kind};

    #[test]
    fn a_diagnosis_for_people() {
        let check = |name: &str, ok, need, advice: Option<&str>| Check {
            name: name.into(),
            ok,
            need,
            found: format!("what {name} is"),
            advice: advice.map(Into::into),
        };
        let d = Diagnosis {
            schema: 1,
            version: "0.1.0".into(),
            kind: Kind::None,
            ready: false,
            kernel: "6.1.0".into(),
            cpu: String::new(),
            modules: vec![],
            checks: vec![
                check("kvm", false, Need::Required, Some("load it")),
                check("tsc", true, Need::Useful, None),
                check("qemu", false, Need::Tests, Some("install it")),
            ],
        };
        let expected = "\
no KVM: no guest can run here
Linux 6.1.0, unknown processor, no KVM module

✗ kvm   NEEDED: what kvm is
        → load it
✓ tsc   what tsc is
✗ qemu  what qemu is
        → install it

Guests cannot run here until what is NEEDED above is there.
";
        assert_eq!(text(&d), expected);
    }
}
