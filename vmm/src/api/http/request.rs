//! A request's line and header fields.

/// The most bytes of a request's line and header fields.
pub const MAX_HEAD: usize = 16 << 10;
/// The most bytes of a request's body.
pub const MAX_BODY: usize = 1 << 20;
/// The most header fields.
const MAX_FIELDS: usize = 64;

/// A request without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// As sent; case matters.
    pub method: String,
    /// The path, without a query.
    pub path: String,
    /// HTTP/1.1, not 1.0: chunked replies are understood.
    pub chunked_ok: bool,
    /// Whether the connection is meant for further requests.
    pub keep_alive: bool,
    /// The body's length, where one was announced.
    pub length: Option<usize>,
    /// The client waits for "100 Continue" before it sends the body.
    pub expects_continue: bool,
    /// The client asks for `text/event-stream`.
    pub event_stream: bool,
}

/// Why there is no request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The peer is gone, or had nothing to say for too long: nothing is owed.
    #[error("the connection ended")]
    Ended,
    /// What came is no request that we serve: say so and close.
    #[error("{sentence}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// One sentence.
        sentence: String,
    },
}

pub(super) fn refused(status: u16, sentence: impl Into<String>) -> ReadError {
    ReadError::Refused {
        status,
        sentence: sentence.into(),
    }
}

/// The answer to a body that is too long.
#[must_use]
pub fn too_large() -> ReadError {
    refused(
        413,
        format!("the request's body is longer than {MAX_BODY} bytes"),
    )
}

/// Parses a head; `None` while it is incomplete.
pub(super) fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, ReadError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let used = match request.parse(bytes) {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(no_request(error)),
    };
    if used > MAX_HEAD {
        return Err(refused(
            431,
            format!("the request's header is longer than {MAX_HEAD} bytes"),
        ));
    }
    let modern = request.version == Some(1);
    let mut head = Head {
        method: request.method.unwrap_or_default().to_owned(),
        path: path_of(request.path.unwrap_or_default()),
        chunked_ok: modern,
        keep_alive: modern,
        length: None,
        expects_continue: false,
        event_stream: false,
    };
    let (mut hosts, mut chunked) = (0, false);
    for field in request.headers.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        hosts += u32::from(is("host"));
        chunked |= is("transfer-encoding");
        head.take(field, modern)?;
    }
    if modern && hosts != 1 {
        return Err(refused(
            400,
            "an HTTP/1.1 request needs one Host header; any value will do",
        ));
    }
    match (chunked, head.length) {
        (true, Some(_)) => Err(refused(
            400,
            "the request has both a Content-Length and a Transfer-Encoding",
        )),
        (true, None) => Err(refused(
            411,
            "chunked requests are not served; send a Content-Length",
        )),
        (false, Some(length)) if length > MAX_BODY => Err(too_large()),
        (false, _) => Ok(Some((head, used))),
    }
}

fn no_request(error: httparse::Error) -> ReadError {
    match error {
        httparse::Error::TooManyHeaders => refused(
            431,
            format!("the request has more than {MAX_FIELDS} header fields"),
        ),
        httparse::Error::Version => refused(505, "this socket speaks HTTP/1.1 and HTTP/1.0 only"),
        error => refused(
            400,
            format!("this is no HTTP request ({error}); try GET /v1/status"),
        ),
    }
}

impl Head {
    /// Takes what a header field says of the request, of HTTP/1.1 if it is `modern`.
    fn take(&mut self, field: &httparse::Header<'_>, modern: bool) -> Result<(), ReadError> {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            if self.length.is_some() {
                return Err(refused(400, "the request has more than one Content-Length"));
            }
            self.length = Some(parse_length(field.value)?);
        } else if is("connection") {
            for token in field.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"close") {
                    self.keep_alive = false;
                } else if token.eq_ignore_ascii_case(b"keep-alive") && !modern {
                    self.keep_alive = true;
                }
            }
        } else if is("accept") {
            let types = field.value.split(|b| *b == b',' || *b == b';');
            self.event_stream |= types
                .map(<[u8]>::trim_ascii)
                .any(|t| t.eq_ignore_ascii_case(b"text/event-stream"));
        } else if is("expect") {
            if !field.value.eq_ignore_ascii_case(b"100-continue") {
                return Err(refused(
                    417,
                    "this socket meets no expectation but 100-continue",
                ));
            }
            self.expects_continue = modern;
        }
        Ok(())
    }
}

fn parse_length(value: &[u8]) -> Result<usize, ReadError> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(refused(400, "the request's Content-Length is no number"));
    }
    // All digits: what does not fit is a number, and too large a one.
    let number = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
    number.ok_or_else(too_large)
}

/// The path of a request target: without a query, and without scheme and authority in absolute
/// form.
fn path_of(target: &str) -> String {
    let mut path = target;
    if let Some((scheme, rest)) = target.split_once("://")
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric())
    {
        path = rest.find('/').map_or("/", |at| &rest[at..]);
    }
    path.split(['?', '#']).next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Option<(Head, usize)>, (u16, String)> {
        parse_head(text.as_bytes()).map_err(|e| match e {
            ReadError::Refused { status, sentence } => (status, sentence),
            ReadError::Ended => panic!("parsing does not end connections"),
        })
    }

    fn status_of(text: &str) -> u16 {
        parse(text).unwrap_err().0
    }

    #[test]
    fn reads_what_curl_sends() {
        let text = "PUT /v1/migrate?x=1 HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\
                    Content-Length: 17\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\r\n{";
        let (head, used) = parse(text).unwrap().unwrap();
        assert_eq!(used, text.len() - 1);
        assert_eq!(
            (head.method.as_str(), head.path.as_str()),
            ("PUT", "/v1/migrate")
        );
        assert_eq!(head.length, Some(17));
        assert!(head.expects_continue && head.keep_alive && head.chunked_ok);
    }

    #[test]
    fn refuses_what_can_be_read_in_two_ways() {
        let with = |fields: &str| {
            status_of(&format!(
                "PUT /v1/pause HTTP/1.1\r\nHost: x\r\n{fields}\r\n"
            ))
        };
        assert_eq!(with("Content-Length: 1\r\nContent-Length: 1\r\n"), 400);
        assert_eq!(
            with("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
            400
        );
        assert_eq!(with("Transfer-Encoding: chunked\r\n"), 411);
        for odd in ["+1", "-1", "0x10", "1 1", ""] {
            assert_eq!(with(&format!("Content-Length: {odd}\r\n")), 400, "{odd:?}");
        }
        assert_eq!(with("Content-Length: 1048577\r\n"), 413);
        assert_eq!(with("Content-Length: 99999999999999999999999999\r\n"), 413);
        assert_eq!(with("Expect: the impossible\r\n"), 417);
        assert_eq!(with("Host: y\r\n"), 400);
        assert_eq!(with(&"A: b\r\n".repeat(65)), 431);
        assert_eq!(status_of("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status_of("GET / HTTP/2.0\r\n\r\n"), 505);
        assert_eq!(status_of("\x16\x03\x01 hello\r\n\r\n"), 400);
    }

    #[test]
    fn http_1_0_closes_and_gets_no_chunks() {
        let (head, _) = parse("GET /v1/status HTTP/1.0\r\n\r\n").unwrap().unwrap();
        assert!(!head.keep_alive && !head.chunked_ok);
        let (head, _) = parse("GET / HTTP/1.1\r\nHost: x\r\nConnection: foo, Close\r\n\r\n")
            .unwrap()
            .unwrap();
        assert!(!head.keep_alive);
    }

    #[test]
    fn hears_who_wants_an_event_stream() {
        let wants = |accept| {
            let text = format!("GET /v1/events HTTP/1.1\r\nHost: x\r\n{accept}\r\n");
            parse(&text).unwrap().unwrap().0.event_stream
        };
        assert!(wants("Accept: text/event-stream\r\n"));
        assert!(wants("accept: */*;q=0.1, Text/Event-Stream;q=0.5\r\n"));
        assert!(!wants("Accept: */*\r\n") && !wants(""));
    }

    #[test]
    fn finds_the_path() {
        for (target, path) in [
            ("/v1/status", "/v1/status"),
            ("/v1/status?pretty", "/v1/status"),
            ("http://localhost/v1/status", "/v1/status"),
            ("http://localhost", "/"),
            ("*", "*"),
        ] {
            assert_eq!(path_of(target), path);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_refused_or_incomplete(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some((_, used))) = parse_head(&bytes) {
                prop_assert!(used <= bytes.len());
            }
        }

        #[test]
        fn a_prefix_of_a_request_is_incomplete(cut in 0usize..57) {
            let text = "PUT /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n";
            prop_assume!(cut < text.len());
            prop_assert_eq!(parse(&text[..cut]), Ok(None));
        }
    }
}
