//! Time as an argument: seconds of the Unix epoch, in UTC.

/// A moment as seconds since 1970-01-01 00:00:00 UTC. Templates that print a
/// date take it from here; the crate reads no clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnixSeconds(pub i64);

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// Fields of a moment in the proleptic Gregorian calendar, UTC.
struct Civil {
    year: i64,
    month: usize,
    day: i64,
    weekday: usize,
    day_of_year: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl UnixSeconds {
    /// Days to a civil date: eras of 400 years counted from 1 March of year 0
    /// (H. Hinnant, chrono-compatible low-level date algorithms).
    fn civil(self) -> Civil {
        let days = self.0.div_euclid(86_400);
        let rest = self.0.rem_euclid(86_400);
        let shifted = days.saturating_add(719_468);
        let era = shifted.div_euclid(146_097);
        let of_era = shifted.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let from_march = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * from_march + 2) / 153;
        let day = from_march - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let day_of_year = if month <= 2 {
            from_march - 305
        } else {
            from_march + 60 + i64::from(leap)
        };
        Civil {
            year,
            month: usize::try_from(month - 1).unwrap_or(0),
            day,
            weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
            day_of_year,
            hour: rest / 3_600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }

    /// Formats as C's `strftime` in the C locale, in UTC. Knows a A b B d e H
    /// I j m M p S y Y F T D R Z %, and `-` for no padding; other directives
    /// stay as they are.
    pub(crate) fn format(self, format: &str) -> String {
        let at = self.civil();
        let mut out = String::with_capacity(format.len() + 16);
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let rest = chars.as_str();
            let (padded, directive) = match (rest.chars().next(), rest.chars().nth(1)) {
                (Some('-'), Some(directive)) => {
                    chars.next();
                    (false, directive)
                }
                (Some(directive), _) => (true, directive),
                (None, _) => {
                    out.push('%');
                    break;
                }
            };
            chars.next();
            at.write(directive, padded, &mut out);
        }
        out
    }
}

impl Civil {
    fn write(&self, directive: char, padded: bool, out: &mut String) {
        let mut number = |value: i64, width: usize| {
            let width = if padded { width } else { 0 };
            out.push_str(&format!("{value:0width$}"));
        };
        let twelve = (self.hour + 11) % 12 + 1;
        match directive {
            'd' => number(self.day, 2),
            'H' => number(self.hour, 2),
            'I' => number(twelve, 2),
            'j' => number(self.day_of_year, 3),
            'm' => number(self.month as i64 + 1, 2),
            'M' => number(self.minute, 2),
            'S' => number(self.second, 2),
            'y' => number(self.year.rem_euclid(100), 2),
            'Y' => number(self.year, 0),
            'e' if padded => out.push_str(&format!("{:2}", self.day)),
            'e' => number(self.day, 0),
            'a' => out.push_str(&DAYS[self.weekday][..3]),
            'A' => out.push_str(DAYS[self.weekday]),
            'b' | 'h' => out.push_str(&MONTHS[self.month][..3]),
            'B' => out.push_str(MONTHS[self.month]),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'F' => self.write_all(&['Y', '-', 'm', '-', 'd'], out),
            'D' => self.write_all(&['m', '/', 'd', '/', 'y'], out),
            'T' => self.write_all(&['H', ':', 'M', ':', 'S'], out),
            'R' => self.write_all(&['H', ':', 'M'], out),
            'Z' => out.push_str("UTC"),
            '%' => out.push('%'),
            other => {
                out.push('%');
                if !padded {
                    out.push('-');
                }
                out.push(other);
            }
        }
    }

    fn write_all(&self, parts: &[char], out: &mut String) {
        for &part in parts {
            if part.is_ascii_alphabetic() {
                self.write(part, true, out)
            } else {
                out.push(part)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_as_the_c_locale_does() {
        // Values from Python's datetime.fromtimestamp(t, UTC).strftime.
        let at = UnixSeconds(1_732_365_907);
        assert_eq!(at.format("%d %b %Y"), "23 Nov 2024");
        assert_eq!(
            at.format("%A %B %j %I:%M %p %y"),
            "Saturday November 328 12:45 PM 24"
        );
        assert_eq!(at.format("%F %T %-m/%-d %%"), "2024-11-23 12:45:07 11/23 %");
        assert_eq!(
            UnixSeconds(951_782_400).format("%F %j %a"),
            "2000-02-29 060 Tue"
        );
        assert_eq!(UnixSeconds(-1).format("%F %T"), "1969-12-31 23:59:59");
        assert_eq!(UnixSeconds(0).format("%Q %"), "%Q %");
    }

    #[test]
    fn days_follow_each_other_for_two_thousand_years() {
        let mut before = UnixSeconds(-62_135_596_800).civil();
        for day in 1..730_000 {
            let now = UnixSeconds(-62_135_596_800 + day * 86_400).civil();
            let next_day = now.day == before.day + 1 && now.month == before.month;
            let next_month = now.day == 1 && now.month == (before.month + 1) % 12;
            assert!(
                next_day || next_month,
                "{}-{}-{}",
                now.year,
                now.month,
                now.day
            );
            let new_year = now.month == 0 && now.day == 1;
            assert_eq!(
                now.day_of_year,
                if new_year { 1 } else { before.day_of_year + 1 }
            );
            before = now;
        }
    }
}
