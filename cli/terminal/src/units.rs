//! Sizes, rates and durations as users write them.
//!
//! Numbers may have a decimal point; the arithmetic is exact and rounds down. Sizes count in powers
//! of 1024, as memory does; rates in powers of 1000, as networks do.

use std::time::Duration;
use time::OffsetDateTime;

/// The most digits after a decimal point; more could not change a result.
const MAX_DECIMALS: usize = 18;

/// Splits "1.5G" into number and unit, and multiplies. `units` are names (compared without case,
/// unless two differ in case only) and factors.
fn scaled(text: &str, units: &[(&str, u128)]) -> Option<u128> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = units
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit))?
        .1;
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty()
        || (number.contains('.') && decimals.is_empty())
        || decimals.len() > MAX_DECIMALS
    {
        return None;
    }
    let whole = whole.parse::<u128>().ok()?.checked_mul(factor)?;
    let part = if decimals.is_empty() {
        0
    } else {
        decimals.parse::<u128>().ok()?
    };
    let divisor = 10u128.checked_pow(u32::try_from(decimals.len()).ok()?)?;
    whole.checked_add(part.checked_mul(factor)? / divisor)
}

/// A size in bytes: `512M`, `1.5G`, `4096K`, or plain bytes.
///
/// # Errors
/// A sentence that shows the form.
pub fn size(text: &str) -> Result<u64, String> {
    let units = [
        ("", 1),
        ("K", 1 << 10),
        ("M", 1 << 20),
        ("G", 1 << 30),
        ("T", 1 << 40),
    ];
    let bytes = scaled(text, &units).and_then(|n| u64::try_from(n).ok());
    bytes.ok_or_else(|| "a size is a number with K, M, G or T, such as 512M or 1.5G".into())
}

/// A rate in bytes per second: `1Gbit`, `2.5Gbit`, `800Mbit` in bits per second, `100M` in bytes
/// per second.
///
/// # Errors
/// A sentence that shows the form.
pub fn rate(text: &str) -> Result<u64, String> {
    // In eighths of a byte, that is in bits.
    let units = [
        ("bit", 1),
        ("Kbit", 1_000),
        ("Mbit", 1_000_000),
        ("Gbit", 1_000_000_000),
        ("K", 8_000),
        ("M", 8_000_000),
        ("G", 8_000_000_000),
    ];
    let bytes = scaled(text, &units).and_then(|bits| u64::try_from(bits / 8).ok());
    bytes.ok_or_else(|| {
        "a rate is a number with Kbit, Mbit or Gbit, or with K, M or G for bytes per second, such as 2.5Gbit or 100M".into()
    })
}

/// A duration: `300ms`, `1.5s`, `10m`, `1h`.
///
/// # Errors
/// A sentence that shows the form.
pub fn duration(text: &str) -> Result<Duration, String> {
    let units = [
        ("us", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    let nanos = scaled(text, &units).and_then(|n| u64::try_from(n).ok());
    let duration = nanos.map(Duration::from_nanos);
    duration
        .ok_or_else(|| "a duration is a number with ms, s, m or h, such as 300ms or 1.5s".into())
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// Bytes on a wire, in powers of 1000.
pub fn traffic(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let (mut scale, mut index) = (1u64, 0);
    // Half a tenth below the next unit would be shown as 1000.0.
    while index + 1 < units.len() && bytes / scale >= 1000 {
        scale = scale.saturating_mul(1000);
        index += 1;
    }
    if index == 0 {
        return format!("{bytes} B");
    }
    let tenths = (u128::from(bytes) * 10 + u128::from(scale) / 2) / u128::from(scale);
    if tenths >= 10_000 && index + 1 < units.len() {
        return format!("1.0 {}", units[index + 1]);
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, units[index])
}

/// Memory in powers of 1024, exactly where it is a whole number of a unit.
pub fn memory(bytes: u64) -> String {
    for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >= 1 << shift && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    if bytes >= 1 << 20 {
        format!("{} MiB", bytes >> 20)
    } else {
        format!("{bytes} B")
    }
}

/// Milliseconds as a person says them.
pub fn span(ms: f64) -> String {
    if !ms.is_finite() || ms < 0.0 {
        "–".into()
    } else if ms < 1.0 {
        format!("{ms:.2} ms")
    } else if ms < 1_000.0 {
        format!("{ms:.1} ms")
    } else if ms < 60_000.0 {
        format!("{:.2} s", ms / 1_000.0)
    } else {
        let seconds = ms / 1_000.0;
        let (hours, rest) = ((seconds / 3_600.0).floor(), seconds % 3_600.0);
        let (minutes, seconds) = ((rest / 60.0).floor(), (rest % 60.0).floor());
        if hours > 0.0 {
            format!("{hours} h {minutes:02} min")
        } else {
            format!("{minutes} min {seconds:02} s")
        }
    }
}

/// A moment as RFC 3339 has it, without its fraction and its zone.
#[must_use]
pub fn to_the_second(at: OffsetDateTime) -> String {
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    let (hour, minute, second) = at.to_hms();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_documented_forms() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("1.5G"), Ok(3 << 29));
        assert_eq!(size("4096k"), Ok(4 << 20));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(rate("1Gbit"), Ok(125_000_000));
        assert_eq!(rate("2.5Gbit"), Ok(312_500_000));
        assert_eq!(rate("800mbit"), Ok(100_000_000));
        assert_eq!(rate("100M"), Ok(100_000_000));
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(duration("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn refuses_what_may_mean_two_things_and_shows_the_form() {
        for odd in [
            "",
            "M",
            "-1M",
            "1,5G",
            "1.G",
            ".5G",
            "1.2.3G",
            "12X",
            "1 000M",
            "99999999999999999999T",
            "1e9",
        ] {
            assert!(size(odd).unwrap_err().contains("512M"), "{odd:?}");
        }
        for odd in ["100", "1", "", "1Gb", "1GB"] {
            assert!(rate(odd).unwrap_err().contains("2.5Gbit"), "{odd:?}");
        }
        for odd in ["300", "1d", "s", "-1s"] {
            assert!(duration(odd).unwrap_err().contains("300ms"), "{odd:?}");
        }
    }

    #[test]
    fn writes_numbers_for_people() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(traffic(999), "999 B");
        assert_eq!(traffic(1_000), "1.0 kB");
        assert_eq!(traffic(999_949), "999.9 kB");
        assert_eq!(traffic(999_950), "1.0 MB");
        assert_eq!(traffic(430_100_000), "430.1 MB");
        assert_eq!(memory(512 << 20), "512 MiB");
        assert_eq!(memory(1536 << 20), "1536 MiB");
        assert_eq!(memory(2 << 30), "2 GiB");
        assert_eq!(memory(0), "0 B");
        assert_eq!(span(0.25), "0.25 ms");
        assert_eq!(span(12.34), "12.3 ms");
        assert_eq!(span(1_234.0), "1.23 s");
        assert_eq!(span(61_500.0), "1 min 01 s");
        assert_eq!(span(7_260_000.0), "2 h 01 min");
        assert_eq!(span(f64::NAN), "–");
    }

    proptest! {
        #[test]
        fn whole_numbers_are_exact(n in 0u64..1 << 24, unit in 0usize..4) {
            let (name, shift) = [("", 0), ("K", 10), ("M", 20), ("G", 30)][unit];
            prop_assert_eq!(size(&format!("{n}{name}")), Ok(n << shift));
        }

        #[test]
        fn decimals_are_exact_to_the_millisecond(ms in 0u64..1 << 40) {
            let text = format!("{}.{:03}s", ms / 1000, ms % 1000);
            prop_assert_eq!(duration(&text), Ok(Duration::from_millis(ms)));
        }

        #[test]
        fn eight_bits_are_a_byte(n in 0u64..1 << 30) {
            prop_assert_eq!(rate(&format!("{}Kbit", n * 8)), rate(&format!("{n}K")));
        }

        #[test]
        fn any_text_is_read_or_refused_in_a_sentence(text in ".{0,40}") {
            for error in [size(&text).err(), rate(&text).err(), duration(&text).err()].into_iter().flatten() {
                prop_assert!(error.contains("such as") && !error.contains('\n'));
            }
        }

        #[test]
        fn grouping_loses_no_digit(n: u64) {
            prop_assert_eq!(grouped(n).replace(',', ""), n.to_string());
        }

        #[test]
        fn any_number_is_written(n: u64, ms: f64) {
            let _ = (traffic(n), memory(n), span(ms));
        }
    }
}
