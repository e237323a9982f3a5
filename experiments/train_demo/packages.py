"""The Debian packages the demo corpus is made of, each with a cap and, where not all of it is prose, what to read."""

import dataclasses
import re

# Pages that are lists, generated from code, or the same in every manual.
SKIP_PATHS = re.compile(
    r"/_(?:modules|sources|static|images|downloads)/|/(?:genindex|py-modindex|modindex|http-routingtable|search"
    r"|bookindex|ix01|theindex|index-all|doc-index[^/]*|std-genindex|contents|copyright|license|gpl|lgpl|fdl|changelog"
    r"|changes|NEWS|README\.Debian|authors|credits|thanks|colophon|print|sitemap)[^/a-z]*\.(?:html?|page)$"
    r"|changelog|release-?notes?|/releases?/|/whatsnew/|/licen[cs]es?/|GNU-Free-Documentation|Copying-This|/js/"
    r"|/acknowledg|[-_]Index(?:-\w)?\.html|/printable",
    re.IGNORECASE,
)
# Translations, by directory or by the end of the name. Pages of no known path are told by their words.
SKIP_LANGUAGES = re.compile(
    r"/(?:translations|ar|bg|bn|ca|cs|da|de|el|eo|es|fa|fi|fr|gl|he|hr|hu|id|it|ja|ko|lt|nb|nl|no|pl|pt|ro|ru|sk|sl|sr"
    r"|sv|tr|uk|vi|zh|(?:[a-z]{2,3}[-_](?!US|GB|en)[A-Z][A-Za-z]{1,3}))(?:/|\.html$)"
    r"|[.-](?:bg|ca|cs|da|de|el|es|fi|fr|hu|it|ja|ko|nb|nl|pl|pt|pt[-_](?:br|BR|PT)|ro|ru|sk|sv|tr|uk|vi|zh[-_]\w+)"
    r"\.(?:html?|utf8|txt|euc-\w+)(?:\.gz)?$|html\.(?:[a-z]{2})(?:\.|$)"
)


@dataclasses.dataclass(frozen=True)
class Package:
    """One package to read.

    `cap` is the most megabytes of its text; `only` and `skip` are regular expressions over the path inside the package;
    `meta` is a metapackage whose dependencies name the package's present version; `why` says what it is good for.
    """

    name: str
    why: str = "manual pages and texts of an everyday program"
    cap: float = 12.0
    only: str | None = None
    skip: str | None = None
    meta: str | None = None


_TEXTS = "a book or guide"
_REFERENCE = "a reference, with much prose"
_MAN = "manual pages"

_MANUALS = (
    Package(
        "python3.11-doc",
        "tutorial, HOWTOs and library reference",
        only=r"/html/",
        skip=r"/c-api/|/whatsnew/",
        meta="python3-doc",
    ),
    Package("debian-handbook", _TEXTS, only=r"/html/en-US/"),
    Package("debian-reference-en", _TEXTS),
    Package("debian-policy", _TEXTS),
    Package("developers-reference", _TEXTS),
    Package("debian-faq", _TEXTS),
    Package("maint-guide", _TEXTS),
    Package("debmake-doc", _TEXTS),
    Package("installation-guide-amd64", _TEXTS, only=r"/en/"),
    Package("harden-doc", "the securing-Debian manual", only=r"/html/(?!.*\.[a-z]{2}\.html)"),
    Package("debian-kernel-handbook", _TEXTS),
    Package("live-manual-html", _TEXTS, only=r"(?:/en/|\.en\.html)"),
    Package("doc-debian", "the Debian charter, in text", only=r"/(?:social-contract|constitution|FAQ).*txt"),
    Package("apt-doc", _TEXTS),
    Package("aptitude-doc-en", _TEXTS),
    Package("fai-doc", _TEXTS),
    Package("postgresql-doc-15", _REFERENCE, skip=r"/release-", meta="postgresql-doc"),
    Package("git-doc", _REFERENCE, skip=r"RelNotes|\.txt$"),
    Package(
        "linux-doc-6.1",
        _REFERENCE,
        cap=8.3,
        skip=r"/translations/|/driver-api/|/gpu/|/core-api/|admin-guide/abi",
        meta="linux-doc",
    ),
    Package("sqlite3-doc", _REFERENCE, skip=r"/c3ref/|/session/|changes\.html|/releaselog/|matrix/|requirements"),
    Package("perl-doc", _REFERENCE, only=r"\.pod$", skip=r"delta\.pod|perltoc|perluniprops", cap=10),
    Package(
        "rust-doc",
        "the Rust books; the dump of the standard library is left out",
        only=r"/html/(?:book|reference|cargo|rustc|rustdoc|embedded-book|nomicon|rust-by-example|edition-guide|style-guide"
        r"|unstable-book)/",
        skip=r"first-edition|second-edition|2018-edition|/print\.html",
    ),
    Package("gimp-help-en", _TEXTS, skip=r"bibliography|glossary-index"),
    Package("gnome-user-docs", _TEXTS, only=r"/help/C/"),
    Package("gnucash-docs", _TEXTS, only=r"-en/"),
    Package("gnumeric-doc", _TEXTS, only=r"/C/"),
    Package("libreoffice-help-en-us", _TEXTS, cap=10),
    Package("inkscape-tutorials", _TEXTS),
    Package("kicad-doc-en", _TEXTS),
    Package("linuxcnc-doc-en", _TEXTS),
    Package("evolution", _TEXTS, only=r"/help/C/"),
    Package("okular", "KDE handbook", only=r"/HTML/en/"),
    Package("kate5-data", "KDE handbook", only=r"/HTML/en/"),
    Package("kstars-data", "KDE handbook with chapters on astronomy", only=r"/HTML/en/"),
    Package("kdevelop-data", "KDE handbook", only=r"/HTML/en/"),
    Package("konsole", "KDE handbook", only=r"/HTML/en/"),
    Package("vim-runtime", "Vim's own help", cap=4, only=r"/doc/[^/]*\.txt$", skip=r"/version\d|todo\.txt|/tags"),
    Package("lilypond-doc", _REFERENCE, cap=0.8, only=r"\.info|/en/.*html"),
    Package("puredata-doc", _TEXTS),
    Package("wireshark-doc", _TEXTS, cap=4),
    Package("shorewall-doc", _TEXTS),
    Package("postfix-doc", _TEXTS, skip=r"\.\d\.html$"),
    Package("exim4-doc-html", _REFERENCE),
    Package("apache2-doc", _REFERENCE, only=r"/manual/en/"),
    Package("bind9-doc", _REFERENCE, skip=r"notes"),
    Package("mutt", _REFERENCE),
    Package("nmap", _REFERENCE),
    Package("ntpsec-doc", _TEXTS),
    Package("bird-doc", _REFERENCE),
    Package("frr-doc", _REFERENCE, cap=0.5),
    Package("drbd-doc", _TEXTS),
    Package("openvswitch-doc", _REFERENCE, cap=0.5),
    Package("ovn-doc", _REFERENCE, cap=2),
    Package("mailutils-doc", _REFERENCE, cap=0.3),
    Package("gnutls-doc", _REFERENCE, cap=0.8, only=r"\.html$"),
    Package("bash-doc", _REFERENCE, only=r"\.html$|\.info"),
    Package("zsh-doc", _REFERENCE, only=r"\.html$"),
    Package("fish-common", _REFERENCE, only=r"\.html$"),
    Package("mercurial-common", _REFERENCE),
    Package("subversion", _REFERENCE),
    Package("cmake-doc", _REFERENCE, cap=1.5, only=r"\.html$", skip=r"/release/"),
    Package("binutils-doc", _REFERENCE, only=r"\.info"),
    Package("autoconf-doc", _REFERENCE, only=r"\.html$"),
    Package("automake", _REFERENCE),
    Package("m4-doc", _REFERENCE),
    Package("diffutils-doc", _REFERENCE, only=r"\.html$"),
    Package("gettext-doc", _REFERENCE, only=r"gettext_?.*html$"),
    Package("octave-doc", _REFERENCE, cap=1, only=r"\.html$"),
    Package("gnuplot-doc", _REFERENCE, cap=0.5, only=r"\.html$"),
    Package("maxima-doc", _REFERENCE, cap=0.8, only=r"/html/maxima"),
    Package("gap-doc", _REFERENCE, cap=1, skip=r"_mj\.html$|chapInd|chapBib"),
    Package("guile-3.0-doc", _REFERENCE, cap=1, only=r"\.info"),
    Package("sbcl-doc", _REFERENCE, only=r"\.info"),
    Package("swi-prolog-doc", _REFERENCE, cap=1.2),
    Package(
        "racket-doc",
        _REFERENCE,
        cap=1.2,
        only=r"/(?:guide|reference|quick|more|continue|scribble|web-server|drracket)/",
    ),
    Package("ghc-doc", "the GHC users' guide", cap=4, only=r"users_guide/", skip=r"-notes"),
    Package("erlang-doc", _REFERENCE, cap=1.2, only=r"/doc/\w+/\w+\.html|/(?:man|html)/", skip=r"notes|release_"),
    Package("nodejs-doc", _REFERENCE, cap=1.8, only=r"/api/.*\.html$", skip=r"/all\.html|deprecations"),
    Package("llvm-14-doc", _REFERENCE, cap=2, only=r"\.html$", skip=r"doxygen|ReleaseNotes"),
    Package("clang-14-doc", _REFERENCE, cap=1, only=r"\.html$", skip=r"doxygen|ReleaseNotes|DiagnosticsReference"),
    Package("libboost1.74-doc", _REFERENCE, cap=1.2, only=r"\.html?$", skip=r"/reference/|/header/|BOOST_|_hpp"),
    Package("ffmpeg-doc", _REFERENCE, cap=4, skip=r"/api/|doxygen|-all\.html"),
    Package("valgrind", _REFERENCE),
    Package("glpk-doc", _REFERENCE),
    Package("python-django-doc", _REFERENCE, cap=8, only=r"\.html$", skip=r"/releases/"),
    Package("python-sqlalchemy-doc", _REFERENCE, cap=2.2, only=r"\.html$", skip=r"changelog|migration"),
    Package("python-scipy-doc", _REFERENCE, cap=1, only=r"\.html$", skip=r"release|/dev/|/generated/"),
    Package("python-pandas-doc", _REFERENCE, cap=1, only=r"\.html$", skip=r"/whatsnew/"),
    Package("python-sklearn-doc", _REFERENCE, cap=1.4, only=r"\.html$", skip=r"whats_new|modules/generated"),
    Package("python-sympy-doc", _REFERENCE, cap=1, only=r"\.html$"),
    Package("python-astropy-doc", _REFERENCE, cap=1, only=r"\.html$", skip=r"whatsnew|/api/|changelog"),
    Package("python-celery-doc", _REFERENCE, cap=4, only=r"\.html$", skip=r"history|whatsnew|changelog|internals/ref"),
    Package("buildbot-doc", _REFERENCE, cap=0.6, only=r"\.html$", skip=r"relnotes"),
    Package("sphinx-doc", _REFERENCE, only=r"\.html$", skip=r"changes"),
    Package("cython-doc", _REFERENCE, only=r"\.html$", skip=r"changes|/cgit"),
    Package("postgis-doc", _REFERENCE, cap=0.8, skip=r"release_notes"),
    Package("nova-doc", _TEXTS, cap=0.8, only=r"\.html$", skip=r"/specs/|configuration/sample|/api/"),
    Package("neutron-doc", _TEXTS, cap=0.8, only=r"\.html$", skip=r"configuration/|/api/"),
    Package("keystone-doc", _TEXTS, cap=0.4, only=r"\.html$", skip=r"/api/|configuration/"),
    Package("cinder-doc", _TEXTS, cap=0.8, only=r"\.html$", skip=r"/api/|configuration/tables|sample"),
    Package("swift-doc", _TEXTS, cap=0.8, only=r"\.html$", skip=r"/api/"),
    Package("ironic-doc", _TEXTS, cap=0.6, only=r"\.html$", skip=r"/api/|configuration/|_modules"),
    Package("libglib2.0-doc", _REFERENCE, cap=0.8),
    Package("libgtk-3-doc", _REFERENCE, cap=0.8),
    Package("qtbase5-doc-html", _REFERENCE, cap=1.5, skip=r"-members\.html|-obsolete|-example"),
    Package("tcl8.6-doc", _MAN, cap=1),
    Package("tk8.6-doc", _MAN, cap=0.7),
    Package("tcllib", _MAN, cap=0.8),
    Package("manpages", _MAN),
    Package("manpages-dev", _MAN),
    Package("dict-gcide", "words of general English", cap=2.5),
    Package("dict-wn", "short definitions of English words", cap=3.5),
    Package("dict-foldoc", "terms of computing", cap=8),
    Package("dict-jargon", "the hackers' dictionary"),
)
# Packages whose manual pages (and small texts) are wanted, in one list: nothing else is particular to them.
_PROGRAMS = """
apt at avahi-utils bash bc bind9-dnsutils bsdextrautils btrfs-progs bzip2 chrony coreutils cpio cron cryptsetup
curl dash dc debhelper debootstrap devscripts dictd diffutils dosfstools dpkg dpkg-dev e2fsprogs ethtool expect fdisk
ffmpeg file findutils fossil gawk gdb gdisk git-annex git-buildpackage gnupg gpg gpg-agent grep groff groff-base
grub2-common gzip hdparm hledger hostname htop imagemagick-6-doc info iproute2 iptables iputils-ping iw jq kmod ledger
less libc-bin lintian lm-sensors login logrotate lsof lua5.4 lvm2 lynx make man-db man2html mawk moreutils mount nano
net-tools netcat-openbsd network-manager nftables openssh-client openssh-server openssl parallel parted passwd patch
pbuilder perl procps psmisc quilt rcs reportbug rsync rsyslog sbuild schroot screen sed smartmontools socat strace sudo
systemd systemd-boot tar taskwarrior tcpdump texinfo texlive-binaries time tmux traceroute udev udisks2 units unzip
util-linux vim-common wget wpasupplicant xfsprogs xterm xz-utils zip
""".split()
# Programs whose manuals are long and of narrow use, in megabytes.
_CAPS = {"groff": 0.6, "imagemagick-6-doc": 0.8, "texinfo": 0.5, "openssl": 0.8, "texlive-binaries": 0.3, "xterm": 0.3}
PACKAGES = (*_MANUALS, *(Package(name, cap=_CAPS.get(name, 3)) for name in _PROGRAMS))
