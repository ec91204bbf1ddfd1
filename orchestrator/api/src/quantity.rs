//! Quantities: `500m`, `1Gi`, `1e3` (apimachinery, `resource.Quantity`).

use std::cmp::Ordering;
use std::fmt;

/// A fixed-point number with nine decimal places, exact in that range.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    /// Billionths.
    nano: i128,
    binary: bool,
}

// How a number is written has no part in what it is.
impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

const NANO: i128 = 1_000_000_000;
/// Larger numbers mean nothing as a resource and would overflow.
const LIMIT: i128 = i64::MAX as i128 * NANO;

const BINARY: [(&str, i128); 6] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
];

/// Text that is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
)]
pub struct QuantityError;

impl Quantity {
    /// # Errors
    /// The text is no quantity.
    pub fn parse(text: &str) -> Result<Self, QuantityError> {
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
        let (number, suffix) = digits.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(QuantityError);
        }
        let (multiplier, divisor, binary) = scale(suffix).ok_or(QuantityError)?;
        let mut value: i128 = 0;
        let mut places: i128 = 1;
        for digit in whole.bytes().chain(fraction.bytes()) {
            value = value
                .saturating_mul(10)
                .saturating_add(i128::from(digit - b'0'))
                .min(i128::MAX / 1000);
        }
        for _ in fraction.bytes() {
            places = places.saturating_mul(10);
        }
        let scaled = value.saturating_mul(multiplier).saturating_mul(NANO);
        let below = places.saturating_mul(divisor);
        // Upstream rounds up what is finer than it can hold.
        let mut nano = scaled / below + i128::from(scaled % below != 0);
        nano = nano.min(LIMIT);
        if text.starts_with('-') {
            nano = -nano;
        }
        Ok(Self { nano, binary })
    }

    #[must_use]
    pub fn from_milli(milli: i64) -> Self {
        Self { nano: i128::from(milli) * (NANO / 1000), binary: false }
    }

    #[must_use]
    pub fn from_value(value: i64) -> Self {
        Self { nano: i128::from(value) * NANO, binary: false }
    }

    /// The same number, written with binary suffixes where it fits.
    #[must_use]
    pub fn binary(self) -> Self {
        Self { binary: true, ..self }
    }

    /// Thousandths, rounded up.
    #[must_use]
    pub fn milli(&self) -> i64 {
        round_up(self.nano, NANO / 1000)
    }

    /// Whole units, rounded up.
    #[must_use]
    pub fn value(&self) -> i64 {
        round_up(self.nano, NANO)
    }

    /// The same number, or the next thousandth above it.
    #[must_use]
    pub fn rounded_to_milli(self) -> Self {
        let unit = NANO / 1000;
        let nano =
            (self.nano.div_euclid(unit) + i128::from(self.nano.rem_euclid(unit) != 0)) * unit;
        Self { nano, ..self }
    }

    #[must_use]
    pub fn is_negative(&self) -> bool {
        self.nano < 0
    }
}

fn round_up(nano: i128, unit: i128) -> i64 {
    let rounded = nano.div_euclid(unit) + i128::from(nano.rem_euclid(unit) != 0);
    i64::try_from(rounded).unwrap_or(i64::MAX)
}

/// Multiplier, divisor and whether the suffix is a binary one.
fn scale(suffix: &str) -> Option<(i128, i128, bool)> {
    if let Some((_, factor)) = BINARY.iter().find(|(name, _)| *name == suffix) {
        return Some((*factor, 1, true));
    }
    let decimal = |exponent: i32| -> Option<(i128, i128, bool)> {
        let power = |exponent: i32| 10_i128.checked_pow(exponent.unsigned_abs());
        if exponent >= 0 {
            Some((power(exponent.min(20))?, 1, false))
        } else {
            Some((1, power(exponent.max(-20))?, false))
        }
    };
    match suffix {
        "" => decimal(0),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        _ => decimal(suffix.strip_prefix(['e', 'E'])?.parse().ok()?),
    }
}

impl fmt::Display for Quantity {
    /// The canonical form: the largest suffix that needs no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        if self.binary && self.nano % NANO == 0 {
            let value = self.nano / NANO;
            for (suffix, factor) in BINARY.iter().rev() {
                if value % factor == 0 {
                    return write!(f, "{}{suffix}", value / factor);
                }
            }
            return write!(f, "{value}");
        }
        let scales: [(i128, &str); 10] = [
            (NANO * 1_000_000_000_000_000_000, "E"),
            (NANO * 1_000_000_000_000_000, "P"),
            (NANO * 1_000_000_000_000, "T"),
            (NANO * 1_000_000_000, "G"),
            (NANO * 1_000_000, "M"),
            (NANO * 1000, "k"),
            (NANO, ""),
            (NANO / 1000, "m"),
            (NANO / 1_000_000, "u"),
            (1, "n"),
        ];
        for (factor, suffix) in scales {
            if self.nano % factor == 0 {
                return write!(f, "{}{suffix}", self.nano / factor);
            }
        }
        write!(f, "{}n", self.nano)
    }
}

impl std::ops::Add for Quantity {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            nano: self.nano.saturating_add(other.nano).min(LIMIT),
            binary: self.binary || other.binary,
        }
    }
}

impl std::ops::Sub for Quantity {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { nano: self.nano.saturating_sub(other.nano), binary: self.binary || other.binary }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_their_canonical_forms() {
        for (text, milli, canonical) in [
            ("500m", 500, "500m"),
            ("0.5", 500, "500m"),
            ("1", 1000, "1"),
            ("1.5Gi", 1_610_612_736_000, "1536Mi"),
            ("1e3", 1_000_000, "1k"),
            ("64Mi", 67_108_864_000, "64Mi"),
            ("100k", 100_000_000, "100k"),
            ("-5", -5000, "-5"),
            (".5", 500, "500m"),
            ("1u", 1, "1u"),
        ] {
            let quantity = Quantity::parse(text).expect(text);
            assert_eq!(
                (quantity.milli(), quantity.to_string().as_str()),
                (milli, canonical),
                "{text}"
            );
        }
        for text in ["", "m", "1.2.3", "1Xi", "one", "1 Gi", "+", "1e", "--1"] {
            assert!(Quantity::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn quantities_compare_by_their_number() {
        let quantity = |text| Quantity::parse(text).expect(text);
        assert_eq!(quantity("1Gi"), quantity("1073741824"));
        assert!(quantity("1Gi") > quantity("1G") && quantity("999m") < quantity("1"));
        assert_eq!(quantity("0.0001").rounded_to_milli(), quantity("1m"));
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        for text in [
            "99999999999999999999999999999999999999999999Ei",
            "1e200",
            "0.00000000000000000000000000001",
        ] {
            let quantity = Quantity::parse(text).expect(text);
            let _ = (quantity + quantity, quantity.value(), quantity.milli(), quantity.to_string());
        }
    }
}
